#!/bin/sh
# The recipes for vcpkg and Conan: what can be checked without them, and a whole run of Conan where
# it is on PATH: recipes.sh ROOT WORK. Exit 77: there is no python3 to read them with.
set -eu
root=$1 work=$2

if ! command -v python3 >/dev/null 2>&1; then
    echo "python3 is not here"
    exit 77
fi
rm -rf "$work"
mkdir -p "$work/tree/tests"
version=$(sed -n 's/^#define VKP_VERSION_STR "\(.*\)"$/\1/p' "$root/valkey_push.h")

# Conan leaves files beside its recipe.
for name in valkey_push.h CMakeLists.txt LICENSE CHANGELOG.md backends examples packaging \
    tests/packaging; do
    cp -R "$root/$name" "$work/tree/$name"
done
cd "$work/tree/packaging"
python3 - "$version" <<'END'
import ast
import json
import re
import sys

for path in ("conan/conanfile.py", "conan/test_package/conanfile.py"):
    with open(path) as file:
        ast.parse(file.read(), path)
with open("vcpkg/valkey-push/vcpkg.json") as file:
    port = json.load(file)
assert port["version"] == sys.argv[1], (port["version"], sys.argv[1])
assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", port["name"]), port["name"]
for name in port["features"]:
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name), name

# The options that the recipes set are options of the tree; a misspelt one would pass in silence.
with open("../CMakeLists.txt") as file:
    known = set(re.findall(r"\b(VKP_[A-Z_]+)\b", file.read()))
for path in ("conan/conanfile.py", "vcpkg/valkey-push/portfile.cmake"):
    with open(path) as file:
        used = set(re.findall(r"\b(VKP_(?!VERSION)[A-Z_]+)\b", file.read()))
    assert used and used <= known, (path, used - known)
END

if ! command -v conan >/dev/null 2>&1; then
    echo "the recipes can be read; Conan and vcpkg are not here to carry them out"
    exit 0
fi
CONAN_HOME=$work/conan
export CONAN_HOME
{
    conan profile detect
    conan create conan -s build_type=Debug
} >"$work/conan.log" 2>&1 || { cat "$work/conan.log"; exit 1; }
[ "$(grep -c '^42 ok' "$work/conan.log")" = 2 ]
echo "conan create: built, and a program with it, in each way"
