# Source this from the repository root: what this machine has (gpus, gpu_memory_mib of the smallest or
# 0 where nobody says, tpus), and in `extras` what `uv sync` needs to use it.

gpus=0 gpu_memory_mib=0
# of several GPUs CUDA_VISIBLE_DEVICES may leave some, or none: numbers from 0 or names
visible="${CUDA_VISIBLE_DEVICES-all}"
if [[ -n "$visible" && "$visible" != -1 ]] && command -v nvidia-smi >/dev/null; then
    chosen=()
    [[ "$visible" == all ]] || chosen=(-i "$visible")
    if sizes="$(nvidia-smi ${chosen[@]+"${chosen[@]}"} --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null)"; then
        gpus=$(wc -l <<<"$sizes")
        gpu_memory_mib=$(sort -n <<<"$sizes" | head -1)
        [[ "$gpu_memory_mib" =~ ^[0-9]+$ ]] || gpu_memory_mib=0
    elif [[ "$visible" == MIG-* ]]; then
        gpus=1 # a process sees one slice, and nvidia-smi takes no names of slices
    fi
fi

# tpu_chips FOLDER: chips on the PCI bus, by the vendor and device ids that JAX looks for too.
tpu_chips() {
    local vendor count=0
    for vendor in "$1"/*/vendor; do
        [[ -r "$vendor" && "$(<"$vendor")" == 0x1ae0 ]] || continue
        case "$(<"${vendor%vendor}device")" in
        0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) count=$((count + 1)) ;;
        esac
    done
    echo "$count"
}
tpus=$(tpu_chips /sys/bus/pci/devices)

extras=()
if ((gpus)); then extras=(--extra gpu); elif ((tpus)); then extras=(--extra tpu); fi
