#!/bin/sh
# An engine without MLX for the supervisor's tests: obeys the contract of engine/boot.rs, then does what `behaviour.sh` in the
# model's folder says.
if [ "$2" = "--probe" ]; then
    echo '{"matmul_rate":1000000000.0,"memory_bandwidth":2000000000.0,"gpu_memory_bytes":null}'
    exit 0
fi
read -r boot
folder=$(printf '%s' "$boot" | sed 's/.*"folder":"\([^"]*\)".*/\1/')

until_stdin_closes() {
    while read -r _; do :; done
}

. "$folder/behaviour.sh"
