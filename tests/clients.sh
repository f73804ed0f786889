#!/bin/sh
# Unchanged programs of others, directly at a server and through the relay with one and with three
# threads: what they print must be the same. Prints a table; exit code 1: something differs.
#   clients.sh [--quick] [--write] [--relay PROGRAM] [--install | --no-install] [NAME...]
# --quick: the programs that take half a minute in all. --write: the table goes into
# docs/relay-clients.md. --install: nothing but that. NAME...: those alone. Libraries come from
# Debian and npm, the latter into build-clients; a program whose library is not here is left out,
# and the table says so.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/tests/clients
work=$root/build-clients
quick=no write=no install=yes relay='' names=''
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=yes ;;
    --write) write=yes ;;
    --no-install) install=no ;;
    --install) install=only ;;
    --relay)
        [ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
        relay=$2
        shift
        ;;
    -*)
        sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    *) names="$names $1" ;;
    esac
    shift
done
has() { command -v "$1" >/dev/null 2>&1; }

# ---------------------------------------------------------------------------------------------
# What is needed

packages='python3-redis php-redis php-cli'
[ $quick = yes ] ||
    packages="$packages python3-rq python3-celery python3-django-redis ruby-redis libredis-perl"
mkdir -p "$work/run"
if [ $install != no ] && has apt-get && [ "$(id -u)" = 0 ]; then
    missing=''
    for package in $packages; do
        dpkg-query -W "$package" >/dev/null 2>&1 || missing="$missing $package"
    done
    if [ -n "$missing" ]; then
        echo "clients.sh: installing$missing"
        { apt-get update -q && for package in $missing; do
            DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
                "$package" || echo "clients.sh: without $package"
        done; } >"$work/apt.log" 2>&1 || true
    fi
fi
cp "$here"/* "$work/run/"
if [ $install != no ] && has npm; then
    (cd "$work/run" && npm install --silent --no-audit --no-fund >"$work/npm.log" 2>&1) ||
        echo "clients.sh: npm: see $work/npm.log"
fi
[ $install != only ] || exit 0
server=$(command -v valkey-server || command -v redis-server) ||
    { echo "clients.sh: there is no valkey-server and no redis-server"; exit 77; }
if [ -z "$relay" ]; then
    relay=$work/valkey-push-relay
    "${CC:-cc}" -O2 "-I$root" "$root/examples/relay.c" "$root"/backends/v*_[ekp]*.c -pthread \
        -o "$relay"
fi

# ---------------------------------------------------------------------------------------------
# The server and two relays

pids=''
end() {
    for pid in $pids; do
        kill "$pid" 2>/dev/null || true
    done
    wait
}
trap end EXIT
trap 'exit 1' INT TERM
# Servers do not say which free port they chose, so one is tried after the other. What answers must
# be the server that was started here: its keys are deleted below.
start_server() { # PORT
    port=$1
    "$server" --port "$port" --save '' --appendonly no --dir "$work" --enable-debug-command yes \
        >"$work/server.log" 2>&1 &
    tries=0
    while kill -0 $! 2>/dev/null && [ $tries -lt 100 ]; do
        case $(redis-cli -p "$port" INFO server 2>/dev/null | tr -d '\r') in
        *"process_id:$!
"*)
            pids=$!
            return 0
            ;;
        esac
        tries=$((tries + 1))
        sleep 0.1
    done
    kill $! 2>/dev/null || true
    return 1
}
first=$((20000 + $$ % 20000))
start_server $first || start_server $((first + 1)) || start_server $((first + 2)) ||
    { cat "$work/server.log"; exit 1; }
start_relay() { # THREADS: sets `port_of`
    rm -f "$work/ready"
    mkfifo "$work/ready"
    "$relay" --server "tcp:127.0.0.1:$port" --listen tcp:127.0.0.1:0 --threads "$1" \
        >"$work/ready" 2>"$work/relay$1.log" &
    pids="$pids $!"
    read -r line <"$work/ready"
    port_of=${line##*:}
}
start_relay 1
port1=$port_of
start_relay 3
port3=$port_of

# ---------------------------------------------------------------------------------------------
# One program

table=$work/table.md
printf '| program | version | one thread | three threads |\n|---|---|---|---|\n' >"$table"
failed=0 count=0

run_at() { # PORT OUTPUT COMMAND...
    at=$1 output=$2
    shift 2
    redis-cli -p "$port" FLUSHALL >/dev/null
    redis-cli -p "$port" SCRIPT FLUSH >/dev/null
    rm -rf "$work/tmp"
    mkdir "$work/tmp"
    code=0
    (cd "$work/run" && PORT=$at WORK=$work/tmp timeout 90 "$@") >"$output" 2>&1 </dev/null ||
        code=$?
    sed -i.bak "s/$at/PORT/g" "$output"
    echo "exit code $code" >>"$output"
}

# compare NAME TITLE VERSION COMMAND...; an empty VERSION: the library is not here.
compare() {
    name=$1 title=$2 version=$3
    shift 3
    case " $names " in
    *" $name "* | '  ') ;;
    *) return 0 ;;
    esac
    if [ -z "$version" ]; then
        echo "$name: not here"
        echo "| $title | not here | | |" >>"$table"
        return 0
    fi
    count=$((count + 1))
    run_at "$port" "$work/$name.direct" "$@"
    results=''
    for threads in 1 3; do
        [ $threads = 1 ] && through=$port1 || through=$port3
        run_at "$through" "$work/$name.relay$threads" "$@"
        if cmp -s "$work/$name.direct" "$work/$name.relay$threads"; then
            result='the same'
        else
            result='differs'
            failed=1
            echo "$name: differs with $threads threads:"
            diff "$work/$name.direct" "$work/$name.relay$threads" | sed 20q
        fi
        results="$results $result |"
    done
    if [ "$(tail -n 1 "$work/$name.direct")" != 'exit code 0' ]; then
        results=' fails directly | |'
        failed=1
        echo "$name: fails directly:"
        tail -n 20 "$work/$name.direct"
    fi
    echo "$name: $(wc -l <"$work/$name.direct") lines:${results%|}"
    echo "| $title | $version |$results" >>"$table"
}

python=python3 # Debian's, which has Debian's libraries
[ ! -x /usr/bin/python3 ] || python=/usr/bin/python3
export NODE_NO_WARNINGS=1 # they name the process

debian() { # PACKAGE: its version, or nothing
    dpkg-query -W -f '${db:Status-Abbrev}${Version}' "$1" 2>/dev/null | sed -n 's/^ii *//p' || true
}
npm_version() { # PACKAGE
    sed -n 's/^  "version": "\(.*\)",*$/\1/p' "$work/run/node_modules/$1/package.json" \
        2>/dev/null || true
}

compare redis_cli 'redis-cli' "$(redis-cli --version | cut -d ' ' -f 2)" sh redis_cli.sh
compare redis_py 'redis-py' "$(debian python3-redis)" "$python" redis_py.py
compare ioredis 'ioredis' "$(npm_version ioredis)" node ioredis.mjs
compare bullmq 'BullMQ' "$(npm_version bullmq)" node bullmq.mjs
compare socket_io_pubsub 'socket.io, two servers, pub/sub adapter' \
    "$(npm_version @socket.io/redis-adapter)" env ADAPTER=pubsub node socket_io.mjs
compare phpredis 'phpredis' "$(debian php-redis)" php phpredis.php
if [ $quick = no ]; then
    compare iovalkey 'iovalkey' "$(npm_version iovalkey)" env LIB=iovalkey node ioredis.mjs
    compare node_redis_2 'node-redis, RESP2' "$(npm_version redis)" env RESP=2 node node_redis.mjs
    compare node_redis_3 'node-redis, RESP3, clientSideCache' "$(npm_version redis)" \
        env RESP=3 node node_redis.mjs
    compare socket_io_sharded 'socket.io, two servers, sharded adapter' \
        "$(npm_version @socket.io/redis-adapter)" env ADAPTER=sharded node socket_io.mjs
    compare socket_io_streams 'socket.io, two servers, streams adapter' \
        "$(npm_version @socket.io/redis-streams-adapter)" env ADAPTER=streams node socket_io.mjs
    compare rq 'rq, one worker' "$(debian python3-rq)" "$python" rq_jobs.py
    compare celery 'Celery, one worker' "$(debian python3-celery)" "$python" celery_run.py
    compare django 'Django, django-redis, database 1' "$(debian python3-django-redis)" \
        "$python" django_cache.py
    compare ruby 'redis-rb' "$(debian ruby-redis)" ruby ruby_redis.rb
    compare perl "Perl's Redis" "$(debian libredis-perl)" perl perl_redis.pl
fi
[ $count -gt 0 ] || { echo "clients.sh: no program ran"; exit 1; }
cat "$table"
if [ $write = yes ]; then
    {
        cat <<'END'
# Programs through the relay

What these programs print through `valkey-push-relay` is what they print directly at the server,
byte for byte. The programs are in [tests/clients/](../tests/clients);
`sh tests/clients.sh --write` runs them and makes this table.

END
        echo "Server: $("$server" --version | sed 's/ sha=.*//'). Relay: one thread, and three."
        echo
        cat "$table"
    } >"$root/docs/relay-clients.md"
fi
exit $failed
