#!/bin/sh
# Shows the relay at work, and checks what it shows; ends by itself in seconds. Needs a C compiler
# only, and installs one where there is none.
#   sh examples/demo.sh                               a stand-alone broker
#   sh examples/demo.sh --server tcp:127.0.0.1:6379   through a real server
# Exit code 0: every message arrived, in order, and nothing was left behind.
set -eu

server=''
case $#,${1-} in
0,*) ;;
2,--server) server=$2 ;;
*)
    echo "usage: sh examples/demo.sh [--server tcp:HOST:PORT|unix:PATH]" >&2
    exit 2
    ;;
esac

case $server in
unix:[!/]*) server=unix:$PWD/${server#unix:} ;; # we are about to change the folder
esac
case $0 in
*/*) cd "${0%/*}/.." ;;
*) cd .. ;;
esac

# ---------------------------------------------------------------------------------------------
# Whatever happens, no process and no file of ours stays.

work='' programs='' relay='' ada='' bob='' cleo='' building=''
cleanup() {
    code=$?
    trap '' HUP INT TERM
    for process in $building $ada $bob $cleo $relay; do
        kill "$process" 2>/dev/null || true
    done
    # The relay removes its socket file on the way out; the folder goes after that.
    for process in $building $ada $bob $cleo $relay; do
        wait "$process" 2>/dev/null || true
    done
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$programs" ] || rm -rf "$programs"
    exit "$code"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "demo: $*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

base=${TMPDIR:-/tmp}
[ ${#base} -le 60 ] || base=/tmp # the path of a socket has about 100 bytes
work=$(mktemp -d "$base/vkp-demo.XXXXXX")

# ---------------------------------------------------------------------------------------------
# A compiler that finds its headers and its linker

compiles() {
    printf '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n' >"$work/probe.c"
    has "$1" && "$1" "$work/probe.c" -o "$work/probe" >/dev/null 2>&1
}

find_compiler() {
    for cc in ${CC:-} cc gcc clang; do
        if compiles "$cc"; then
            return 0
        fi
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        fail "neither root nor sudo: please install a C compiler first"
    fi
}

if ! find_compiler; then
    echo "no C compiler: installing one"
    if has apt-get; then
        as_root apt-get update -q
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -q -y --no-install-recommends gcc libc6-dev
    elif has brew; then
        brew install llvm
        PATH=$(brew --prefix llvm)/bin:$PATH
    elif has xcode-select; then
        xcode-select --install || true # opens a window and returns at once
        fail "please finish the installation in the window, then run this again"
    else
        fail "no apt-get and no brew: please install a C compiler"
    fi
    find_compiler || fail "the compiler that was installed does not work"
fi

# ---------------------------------------------------------------------------------------------
# Both programs at once, each by one line; in a folder of this run's own, since build/ may be in use

echo "building the relay and a client with $cc"
programs=build/demo-$$
mkdir -p "$programs"
"$cc" -O2 -I. examples/relay.c backends/v*_[ekp]*.c -pthread -o "$programs/valkey-push-relay" &
building=$!
"$cc" -O2 -I. examples/demo_client.c backends/vkp_backend_poll.c -pthread \
    -o "$programs/demo_client" || fail "the client does not build"
wait "$building" || fail "the relay does not build"
building=''

# ---------------------------------------------------------------------------------------------
# The relay. Reading its line from a pipe waits exactly as long as it takes; if it ends instead,
# the pipe ends too.

socket=$work/relay.sock
address=unix:$socket
channel=news
publish_at=$address
set --
if [ -n "$server" ]; then
    channel=news-$$ # nobody else's
    publish_at=$server
    set -- --server "$server"
fi
pattern=$channel'*'

show_file() {
    if [ -S "$1" ]; then
        ls -ln "$1" | { read -r mode rest && echo "  $mode $1"; }
    else
        echo "  no file $1"
    fi
}

echo
echo "the socket file, before the relay runs:"
show_file "$socket"
[ ! -e "$socket" ] || fail "it should not be there"

mkfifo "$work/ready" "$work/events"
"$programs/valkey-push-relay" "$@" --listen "$address" >"$work/ready" &
relay=$!
exec 4<"$work/ready"
read -r line <&4 || fail "the relay ended before it was ready"
echo "the relay says: $line"
[ "$line" = "ready: $address" ] || fail "expected \"ready: $address\""
show_file "$socket"
[ -S "$socket" ] || fail "the socket file should be there"

# ---------------------------------------------------------------------------------------------
# Three clients. Their lines come through one pipe, which ends when they have all ended.

echo
echo "three clients, two of the channel $channel, one of the pattern $pattern:"
"$programs/demo_client" subscribe ada "$address" channel "$channel" 3 >"$work/events" &
ada=$!
"$programs/demo_client" subscribe bob "$address" channel "$channel" 3 >"$work/events" &
bob=$!
"$programs/demo_client" subscribe cleo "$address" pattern "$pattern" 3 >"$work/events" &
cleo=$!
exec 3<"$work/events"

ada_saw='' bob_saw='' cleo_saw=''
note() {
    echo "  $1 $2"
    case $1 in
    ada) ada_saw="$ada_saw$2;" ;;
    bob) bob_saw="$bob_saw$2;" ;;
    cleo) cleo_saw="$cleo_saw$2;" ;;
    *) fail "a line of nobody: $1 $2" ;;
    esac
}

for each in 1 2 3; do
    read -r who what <&3 || fail "a client ended before it had subscribed"
    note "$who" "$what"
done

# Answered by the server where there is one: then its subscriptions stand, whatever the order in
# which the relay and we got here.
count=$("$programs/demo_client" ask "$address" PUBSUB NUMSUB "$channel") || fail "$count"
if [ -n "$server" ]; then
    echo "for the server that is one subscriber: PUBSUB NUMSUB says $count"
    [ "$count" = "$channel 1" ] || fail "expected $channel 1"
else
    echo "PUBSUB NUMSUB says $count"
    [ "$count" = "$channel 2" ] || fail "expected $channel 2"
fi

echo
echo "publishing at $publish_at:"
for text in one two three; do
    receivers=$("$programs/demo_client" ask "$publish_at" PUBLISH "$channel" "$text") ||
        fail "PUBLISH: $receivers"
    echo "  PUBLISH $channel $text: $receivers receivers"
    [ -n "$server" ] || [ "$receivers" = 3 ] || fail "expected 3 receivers"
done
while read -r who what <&3; do
    note "$who" "$what"
done

expected=''
for text in one two three; do
    expected="${expected}received $text from $channel;"
done
[ "$ada_saw" = "subscribed to $channel;$expected" ] || fail "ada saw: $ada_saw"
[ "$bob_saw" = "subscribed to $channel;$expected" ] || fail "bob saw: $bob_saw"
[ "$cleo_saw" = "subscribed to $pattern;$expected" ] || fail "cleo saw: $cleo_saw"
for client in $ada $bob $cleo; do
    wait "$client" || fail "a client failed"
done
ada='' bob='' cleo=''

# ---------------------------------------------------------------------------------------------
# The end of the relay, and a socket shared by reference

echo
echo "the relay is told to stop (SIGTERM):"
kill -TERM "$relay"
wait "$relay" || fail "the relay ended with exit code $?"
relay=''
show_file "$socket"
[ ! -e "$socket" ] || fail "its socket file should be gone"

echo
echo "three references to one socket in one program:"
shared=$("$programs/demo_client" share "$work/shared.sock") || fail "sharing a socket: $shared"
echo "$shared"
[ "$shared" = "1 taken, the file is there
2 taken, the file is there
3 taken, the file is there
2 left, the file is there
1 left, the file is there
0 left, the file is gone" ] || fail "the file should live exactly as long as its references"

for file in "$work"/*.sock*; do
    [ ! -e "$file" ] || fail "$file was left behind"
done

if [ ! -e build/valkey-push-relay ]; then
    mv "$programs/valkey-push-relay" build/
fi
echo
echo "all 9 messages arrived, each client's in order; the relay is build/valkey-push-relay"
