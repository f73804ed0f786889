# SPDX-License-Identifier: MIT
# redis-py: pipelines, WATCH, pub/sub, databases, blocking commands, locks, users, clients by their
# numbers, streams, scripts, MONITOR, large values, asyncio.
import asyncio
import os
import threading
import time

import redis
import redis.asyncio

PORT = int(os.environ["PORT"])


def client(**options):
    return redis.Redis(port=PORT, decode_responses=True, **options)


def show(function, *arguments, **options):
    """Prints what a call returns or raises."""
    try:
        result = function(*arguments, **options)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    print(result, flush=True)
    return result


def in_a_while(function, *arguments):
    """Calls the function when the commands that follow block already."""
    timer = threading.Timer(0.2, function, arguments)
    timer.start()


def pipelines(r):
    with r.pipeline() as pipe:
        pipe.set("k", 1).incr("k").get("k")
        show(pipe.execute)
    with r.pipeline(transaction=False) as pipe:
        for i in range(3000):
            pipe.set(f"k{i}", i)
        print(len(pipe.execute()))
        pipe.lpush("k", 1).get("k")
        show(pipe.execute)
        pipe.lpush("k", 1).get("k")
        show(pipe.execute, raise_on_error=False)


def optimistic(r):
    with r.pipeline() as pipe:
        pipe.watch("k")
        r.set("k", 77)
        pipe.multi()
        pipe.set("k", 1)
        show(pipe.execute)
        pipe.watch("k")
        pipe.multi()
        pipe.set("k", 5)
        show(pipe.execute)
    r.set("count", 0)

    def increments():
        mine = client()
        for _ in range(20):
            mine.transaction(lambda pipe: increment(pipe), "count")

    def increment(pipe):
        value = int(pipe.get("count"))
        pipe.multi()
        pipe.set("count", value + 1)

    threads = [threading.Thread(target=increments) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    show(r.get, "count")


def messages(r):
    pubsub = r.pubsub()
    pubsub.subscribe("news")
    pubsub.psubscribe("n*")
    for _ in range(2):
        show(pubsub.get_message, timeout=5)
    show(r.publish, "news", "hello")
    for _ in range(2):
        show(pubsub.get_message, timeout=5)
    show(r.pubsub_numsub, "news")
    pubsub.unsubscribe()
    show(pubsub.get_message, timeout=5)
    pubsub.close()


def databases(r):
    one = client(db=1)
    r.config_set("notify-keyspace-events", "KEA")
    pubsub = one.pubsub()
    pubsub.psubscribe("__keyspace@1__:*")
    show(pubsub.get_message, timeout=5)
    show(one.set, "only", 1)
    show(pubsub.get_message, timeout=5)
    r.config_set("notify-keyspace-events", "")
    pubsub.close()
    show(r.get, "only")
    show(one.dbsize)
    show(one.flushdb)
    show(redis.from_url(f"redis://localhost:{PORT}/7").set, "u", 1)
    show(redis.from_url(f"redis://localhost:{PORT}/99").set, "u", 1)


def blocking(r):
    show(r.blpop, "none", timeout=0.1)
    in_a_while(client().rpush, "list", "v")
    show(r.blpop, ["none", "list"], timeout=5)
    in_a_while(client(db=1).zadd, "sorted", {"v": 1})
    show(client(db=1).bzpopmin, ["none", "sorted"], timeout=5)
    impatient = client(socket_timeout=0.2)
    show(impatient.blpop, "later", timeout=3)
    while r.info("clients")["blocked_clients"] > 0:
        time.sleep(0.01)
    show(r.rpush, "later", "kept")
    show(r.lpop, "later")
    heard = []
    threads = [
        threading.Thread(target=lambda: heard.append(client().blpop("many", timeout=10)))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    while r.info("clients")["blocked_clients"] < 50:
        time.sleep(0.01)
    r.rpush("many", *range(50))
    for thread in threads:
        thread.join()
    print(sorted(int(value) for _, value in heard) == list(range(50)))


def locks(r):
    lock = r.lock("lock", timeout=5)
    show(lock.acquire)
    show(r.lock("lock", timeout=1, blocking_timeout=0.2).acquire)
    show(lock.extend, 5)
    show(lock.release)
    show(lock.release)


def users(r):
    show(r.acl_setuser, "bob", enabled=True, passwords=["+pw"], commands=["+@all", "-flushall"],
         keys=["b:*"], channels=["*"])
    bob = client(username="bob", password="pw", db=4, client_name="bobby")
    show(bob.acl_whoami)
    show(bob.set, "b:1", 1)
    show(bob.set, "c:1", 1)
    show(bob.flushall)
    show(bob.client_getname)
    show(bob.keys)
    show(client(username="bob", password="wrong").ping)
    show(r.acl_whoami)
    show(r.acl_deluser, "bob")


def numbers(r):
    me = client(single_connection_client=True, client_name="solo")
    show(me.client_getname)
    number = me.client_id()
    info = me.client_info()
    print(info["name"], info["db"], info["id"] == number)
    show(r.client_kill_filter, _id=number)
    show(me.ping)
    blocked = client(single_connection_client=True, db=2)
    number = blocked.client_id()
    ends = []
    thread = threading.Thread(target=lambda: ends.append(blocked.blpop("none", timeout=10)))
    thread.start()
    while r.info("clients")["blocked_clients"] < 1:
        time.sleep(0.01)
    show(r.client_unblock, number)
    thread.join()
    print(ends)
    show(r.client_unblock, 99999999)


def streams(r):
    show(r.xadd, "s", {"a": 1}, id="1-1")
    show(r.xread, {"s": 0}, block=100)
    show(r.xread, {"s": "$"}, block=50)
    show(r.xgroup_create, "s", "g", 0)
    show(r.xgroup_create, "s", "g", 0)
    show(r.xreadgroup, "g", "c", {"s": ">"}, block=100)
    show(r.xack, "s", "g", "1-1")
    in_a_while(lambda: client().xadd("s", {"b": 2}, id="2-1"))
    show(r.xread, {"s": "$"}, block=5000)
    show(r.xinfo_groups, "s")


def scripts(r):
    script = r.register_script('return {KEYS[1], ARGV[1], redis.call("INCR", KEYS[1])}')
    show(script, keys=["n"], args=[1])
    show(r.script_flush)
    show(script, keys=["n"], args=[1])
    with r.pipeline() as pipe:
        script(keys=["n"], args=[2], client=pipe)
        pipe.get("n")
        show(pipe.execute)


def large(r):
    value = "x" * 3000000
    r.set("large", value)
    print(r.get("large") == value)
    with client(db=1).pipeline(transaction=False) as pipe:
        pipe.set("large", value)
        for _ in range(20):
            pipe.get("large")
        print([len(each) if isinstance(each, str) else each for each in pipe.execute()])


def monitored(r):
    with r.monitor() as monitor:
        in_a_while(client(db=1).set, "seen", 1)
        for command in monitor.listen():
            if "seen" in command["command"]:
                print(command["db"], command["command"])
                break


async def asynchronous():
    r = redis.asyncio.Redis(port=PORT, db=2, decode_responses=True)
    print(await r.set("x", 1), await r.get("x"))
    print(sum(await asyncio.gather(*[r.incr("n") for _ in range(200)])))
    async with r.pipeline(transaction=True) as pipe:
        await pipe.watch("x")
        pipe.multi()
        print(await pipe.set("x", 2).get("x").execute())
    try:
        await asyncio.wait_for(r.blpop("none", timeout=5), 0.2)
    except asyncio.TimeoutError as error:
        print(type(error).__name__)
    print(await r.get("x"))
    await r.close()


def main():
    r = client()
    for part in (pipelines, optimistic, messages, databases, blocking, locks, users, numbers,
                 streams, scripts, large, monitored):
        print("##", part.__name__)
        part(r)
    asyncio.run(asynchronous())


main()
