#!/bin/sh
# The prelude of a part: an #include for each part that it may use (layers.txt), in the header's
# order. To compile a part: layers.sh loop.c >prelude.h; cc -include prelude.h -c src/loop.c
#   layers.sh PART
set -eu
here=$(cd "$(dirname "$0")" && pwd)
LC_ALL=C awk -v part="$1" -v here="$here" '
    function use(name,    count, needed, i) {
        if (used[name]) return
        used[name] = 1
        if (name != "platform.c" && !(name in needs)) {
            print "src/layers.txt has no line for " name >"/dev/stderr"
            failed = 1
            exit 1
        }
        count = split(needs[name], needed, " ")
        for (i = 1; i <= count; i++) use(needed[i])
    }
    /^#/ || /^$/ { next }
    FILENAME ~ /layers\.txt$/ { name = $1; sub(/:$/, "", name); $1 = ""; needs[name] = $0; next }
    { order[++parts] = $1 }
    END {
        if (failed) exit 1
        used["config.h"] = used["api.h"] = used["handles.h"] = 1
        use(part)
        if (part ~ /\.c$/) print "#define VKP_IMPLEMENTATION"
        for (i = 1; i <= parts; i++)
            if (used[order[i]] && order[i] != part)
                print "#include \"" here "/" order[i] "\""
    }' "$here/layers.txt" "$here/order.txt"
