# Sourced: how programs of a compiler's target run here.

# runner COMPILER EMULATOR WORK: sets `runner` to nothing (as they are: this kernel runs them, as
# x86_64 runs i686), or to the emulator; fails when there is no way.
find_runner() {
    printf 'int main(void) { return 0; }\n' >"$3/runs.c"
    "$1" -x c -static "$3/runs.c" -o "$3/runs" || return 1
    runner=''
    "$3/runs" 2>/dev/null && return 0
    runner=$2
    "$2" "$3/runs" 2>/dev/null
}
