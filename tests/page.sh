#!/bin/sh
# The page of the relay's --metrics in a headless Chromium: it connects, shows traffic, an outage of
# the server and a restart of the relay, by mouse and by keyboard, light and dark, and 380 px wide.
#   page.sh [--relay PROGRAM] [--shots FOLDER]     FOLDER gets screenshots
# Skipped, with exit code 77, where there is no Chromium, no Node.js or no server.
# SPDX-License-Identifier: MIT
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
relay='' shots=''

while [ $# -gt 0 ]; do
    case $1 in
    --relay) relay=$2 && shift ;;
    --shots) shots=$2 && shift ;;
    *) echo "usage: page.sh [--relay PROGRAM] [--shots FOLDER]" >&2 && exit 2 ;;
    esac
    shift
done

# The first of these programs that is there.
first() {
    for name in "$@"; do
        if command -v "$name" 2>/dev/null; then
            return
        fi
    done
}
browser=$(first chromium chromium-browser google-chrome)
server=${VKP_TEST_SERVER:-$(first valkey-server redis-server)}
for each in "Chromium:$browser" "Node.js:$(first node)" "server:$server"; do
    if [ -z "${each#*:}" ]; then
        echo "page: left out, there is no ${each%%:*}"
        exit 77
    fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "$relay" ]; then
    relay=$work/valkey-push-relay
    "${CC:-cc}" -O2 "-I$root" "$root/examples/relay.c" "$root"/backends/v*_[ekp]*.c -pthread \
        -o "$relay"
fi
BROWSER=$browser SERVER=$server RELAY=$relay WORK=$work SHOTS=$shots \
    node "$root/tests/page/page.mjs"
