#!/bin/sh
# SPDX-License-Identifier: MIT
# redis-cli: databases, commands on standard input in both protocols, --pipe, --scan, --bigkeys, the
# script debugger, MONITOR and subscriptions.
cli() {
    redis-cli -p "$PORT" "$@"
}
section() {
    echo "## $*"
}

section databases
cli -n 5 SET key five
cli -n 5 GET key
cli GET key
cli -n 99 GET key

section 'commands on standard input'
commands() {
    cat <<'END'
SELECT 3
SET key three
GET key
SELECT 0
GET key
SWAPDB 0 3
GET key
MULTI
SET other 1
SELECT 5
GET key
EXEC
GET key
SELECT 0
WATCH key
MULTI
SET key new
EXEC
MULTI
NOSUCH
EXEC
HSET hash a 1 b 2
HGETALL hash
CLIENT SETNAME joe
SELECT 2
CLIENT GETNAME
RESET
CLIENT GETNAME
BLPOP none 0.05
BLPOP none x
RPUSH list 1 2 3
BLPOP list 0
BLMOVE list other-list LEFT RIGHT 1
XADD stream 1-1 f v
XREAD BLOCK 10 STREAMS stream 0
XREAD BLOCK 10 STREAMS stream $
ZADD sorted 1 a 2 b
BZPOPMIN sorted 0
ZRANGE sorted 0 -1 WITHSCORES
WAIT 0 10
CLIENT TRACKING ON
CLIENT TRACKINGINFO
CLIENT TRACKING OFF
CLIENT NO-EVICT ON
CLIENT KILL ID 99999999
CLIENT UNBLOCK 99999999
AUTH default wrong
READONLY
COMMAND COUNT
OBJECT ENCODING key
GEOADD places 13.36 38.11 here
GEOPOS places here
FUNCTION LIST
ACL WHOAMI
END
}
commands | cli
section 'the same in RESP3'
cli FLUSHALL
commands | cli -3
for type in string integer double null array set map attrib verbatim bignum true false; do
    cli DEBUG PROTOCOL $type
    cli -3 DEBUG PROTOCOL $type
done

section scripts
cli EVAL 'return {1, 2.7, "x", redis.call("SET", KEYS[1], ARGV[1]), {false, true}}' 1 k v
cli EVAL 'redis.call("SELECT", 4) redis.call("SET", "in-four", "1") return 1' 0
cli -n 4 GET in-four
cli GET in-four
cli EVAL 'return redis.error_reply("MY error")' 0
cli SCRIPT LOAD 'return 1'
cli EVALSHA e0e1f9fabfc9d4800c877a703b823ac0578ff8db 0

section 'pipe and scan'
cli FLUSHALL
i=0
while [ $i -lt 2000 ]; do
    printf '*3\r\n$3\r\nSET\r\n$%d\r\nkey:%d\r\n$1\r\n1\r\n' $((4 + ${#i})) $i
    i=$((i + 1))
done | cli --pipe
cli --scan --pattern 'key:1*' | LC_ALL=C sort | cksum
cli --bigkeys -i 0 | grep 'summed\|strings with'
echo hello | cli -x SET from-stdin
cli GET from-stdin

section 'the script debugger'
cat >"$WORK/script.lua" <<'END'
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1])
return {before, ARGV[1]}
END
for mode in --ldb --ldb-sync-mode; do
    printf 'step\nprint\nredis GET key\ncontinue\n\n' |
        cli $mode --eval "$WORK/script.lua" key , value
    cli GET key
done
cli --eval "$WORK/script.lua" key , value

section 'what others do'
: >"$WORK/monitor"
: >"$WORK/messages"
redis-cli -p "$PORT" MONITOR >>"$WORK/monitor" &
monitor=$!
until grep -q OK "$WORK/monitor"; do sleep 0.02; done
cli -n 3 SET watched yes
until grep -q watched "$WORK/monitor"; do sleep 0.02; done
kill $monitor
grep -c 'SET" "watched" "yes"' "$WORK/monitor"
redis-cli -p "$PORT" SUBSCRIBE one two >>"$WORK/messages" &
subscriber=$!
until grep -q two "$WORK/messages"; do sleep 0.02; done
cli PUBLISH two message
until grep -q message$ "$WORK/messages"; do sleep 0.02; done
kill $subscriber
cat "$WORK/messages"
