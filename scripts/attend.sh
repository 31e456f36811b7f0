# Source this: how speedrun_jax.sh and the sweeps of scripts/runs/ run a program that takes long, and
# how they note that it has finished.

# process 1 of a container hears only what it asks for, and does so between programs too
trap 'exit 143' TERM

# attend PROGRAM...: run a program that hears of SIGTERM and Ctrl-C when this shell does, and wait for
# its end: training saves. In the foreground it would not, when the shell alone is told: by `docker
# stop`, for one. A second Ctrl-C waits for nothing. Once told, this fails, even where the program
# reached its end.
attend() {
    local status stopped=0 heard=1
    child=""
    trap 'heard=1 stopped=143; kill -TERM "$child" 2>/dev/null || true' TERM
    trap 'interrupt' INT
    "$@" &
    child=$!
    ((!stopped)) || kill -TERM "$child" 2>/dev/null || true # told before it had a number
    while ((heard)); do # a signal ends the wait alone, and its status is not the program's
        heard=0 status=0
        wait "$child" || status=$?
    done
    trap 'exit 143' TERM
    trap - INT
    if ((stopped)); then
        if [[ -t 1 ]]; then printf '\e[?25h'; fi # a bar had hidden the cursor
        echo "stopped; the same command continues" >&2
    fi
    return "$((status ? status : stopped))"
}

interrupt() {
    local signal=KILL
    if ((!stopped)); then
        signal=TERM
        printf "\nstopping: training saves first; Ctrl-C again stops at once\n" >&2 # below a bar
    fi
    heard=1 stopped=143
    kill "-$signal" "$child" 2>/dev/null || true
}

# finish MARK COMMAND PROGRAM...: run PROGRAM, and when it succeeds write COMMAND into the file MARK and
# remove MARK.SOMETHING, of what stood on it. Meanwhile there is no mark, so that a kill leaves none. An
# older one comes back after status 2, where PROGRAM was refused and has replaced nothing.
finish() {
    local mark="$1" command="$2" before="" status=0
    [[ ! -f "$mark" ]] || before="$(<"$mark")"
    rm -f "$mark"
    "${@:3}" || status=$?
    case "$status" in
    0)
        rm -f "$mark".*
        echo "$command" >"$mark"
        ;;
    2) [[ -z "$before" ]] || echo "$before" >"$mark" ;;
    esac
    return "$status"
}
