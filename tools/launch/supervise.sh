#!/usr/bin/env bash
# Runs a command until it is done, where no scheduler restarts it:
#
#     tools/launch/supervise.sh python -m experiments.pretrain --workdir=runs/tiny
#
# 75 (stopped by a signal after a save) is started again at once. 2 (a mistake in the call) and 17
# (a step computed twice differed, for the second time) end, since trying again would not help.
# Everything else, kills included, is tried again after a pause that doubles from BACKOFF seconds
# (5) to 300, and no more than ATTEMPTS times (10) in a row within 10 minutes of their start.
# SIGTERM and SIGINT are handed on, and then nothing is started again.
set -u
pause=${BACKOFF:-5} failures=0 child= stopping=
trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child"' TERM INT

while true; do
    started=$SECONDS
    "$@" &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended `wait` before the child ended
        wait "$child"
        code=$?
    done
    child=
    case $code in
    0 | 2 | 17) exit "$code" ;;
    esac
    [ -n "$stopping" ] && exit "$code"
    [ $code -eq 75 ] && continue
    if [ $((SECONDS - started)) -ge 600 ]; then
        failures=0 pause=${BACKOFF:-5}
    fi
    failures=$((failures + 1))
    if [ $failures -ge "${ATTEMPTS:-10}" ]; then
        echo "supervise: $failures failures in a row, the last with code $code" >&2
        exit "$code"
    fi
    echo "supervise: code $code; again in $pause s" >&2
    sleep "$pause" &
    wait $!
    [ -n "$stopping" ] && exit "$code"
    pause=$((pause * 2 > 300 ? 300 : pause * 2))
done
