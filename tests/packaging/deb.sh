#!/bin/sh
# The relay's Debian package is built, holds what it should and nothing else, and its program runs:
# deb.sh ROOT BUILD WORK. Exit 77: there is no dpkg-deb.
set -eu
root=$1 build=$2 work=$3

if ! command -v dpkg-deb >/dev/null 2>&1; then
    echo "dpkg-deb is not here"
    exit 77
fi
rm -rf "$work"
mkdir -p "$work"
cd "$build"
DESTDIR='' cpack -G DEB -B "$work" >"$work/cpack.log" 2>&1 || { cat "$work/cpack.log"; exit 1; }
set -- "$work"/valkey-push-relay_*.deb
[ $# = 1 ] && [ -f "$1" ]
package=$1

cat >"$work/expected.txt" <<'END'
-rw-r--r-- ./usr/lib/systemd/user/valkey-push-relay.service
-rw-r--r-- ./usr/share/doc/valkey-push-relay/changelog.gz
-rw-r--r-- ./usr/share/doc/valkey-push-relay/copyright
-rw-r--r-- ./usr/share/man/man1/valkey-push-relay.1.gz
-rwxr-xr-x ./usr/bin/valkey-push-relay
END
dpkg-deb -c "$package" | awk '
    $1 !~ /^d/ { print $1, $6 }
    $2 != "root/root" { print "of " $2 ":", $6 }' | LC_ALL=C sort >"$work/contents.txt"
diff "$work/expected.txt" "$work/contents.txt"

field() { dpkg-deb -f "$package" "$1"; }
version=$(sed -n 's/^#define VKP_VERSION_STR "\(.*\)"$/\1/p' "$root/valkey_push.h")
[ "$(field Package) $(field Version)" = "valkey-push-relay $version" ]
[ "$(field Architecture)" = "$(dpkg --print-architecture)" ]
field Depends | grep -q libc6
field Description | sed 1q | grep -q 'Valkey'

dpkg-deb -x "$package" "$work/root"
program=$work/root/usr/bin/valkey-push-relay
[ "$("$program" --version)" = "valkey-push-relay $version" ]
gzip -dc "$work/root/usr/share/man/man1/valkey-push-relay.1.gz" | sed 's/\\-/-/g' \
    >"$work/manual.txt"
"$program" --help | grep -o -e '--[a-z-]*[a-z]' | LC_ALL=C sort -u >"$work/options.txt"
[ "$(wc -l <"$work/options.txt")" -gt 10 ]
while read -r option; do
    # An option that the next letter continues is another one.
    if ! grep -q -e "$option\([^a-z-]\|$\)" "$work/manual.txt"; then
        echo "the manual page lacks $option"
        exit 1
    fi
done <"$work/options.txt"
echo "$(basename "$package"): $(wc -l <"$work/options.txt") options in its manual page"
