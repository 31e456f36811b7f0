# Source this from the repository root: what this machine has (gpus, gpu_memory_mib of the smallest,
# tpus), and in `extras` what `uv sync` needs to use it.

gpus=0 gpu_memory_mib=0
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
    gpu_memory_mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | head -1)
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
