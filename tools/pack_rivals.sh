#!/usr/bin/env bash
# Packs what benchmarks/rivals.py times, for a GPU machine that reaches no registry: x86-64, Python 3.12, torch with CUDA 13.
#
#   bash tools/pack_rivals.sh FOLDER [CHECKOUT_OF_SLA]     three parts, each below 60 MiB: FOLDER/1, FOLDER/2, FOLDER/3
#
# On the machine, with all three parts in one folder (or their files in one):
#
#   bash FOLDER/3/unpack.sh /tmp/site FOLDER/1 FOLDER/2 FOLDER/3
#   export PYTHONPATH=$PWD:/tmp/site:/tmp/site/nvidia_cutlass_dsl/dsl_packages
#   python3 benchmarks/rivals.py
#
# SLA is on no registry: git clone https://github.com/thu-ml/SLA. Without it its rows say so, as do those of any package
# that is left out here.
set -euo pipefail

folder=${1:?folder for the parts}
sla=${2:-}
dsl=4.8.1 # of nvidia-cutlass-dsl: all its parts have to be of one version
mkdir -p "$folder"/{1,2,3} "$folder/wheels"

fetch() {
    local tags=()
    for glibc in 17 24 27 28 34 35; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done
    python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
        --abi cp312 --abi abi3 --abi none "${tags[@]}" --platform manylinux2014_x86_64 --dest "$folder/wheels" "$@"
}

unpack() { python3 -m zipfile -e "$1" "$2"; }

fetch "nvidia-cutlass-dsl==$dsl" "nvidia-cutlass-dsl-libs-base==$dsl" "nvidia-cutlass-dsl-libs-core==$dsl" \
    "nvidia-cutlass-dsl-libs-cu13==$dsl" apache-tvm-ffi torch-c-dlpack-ext quack-kernels einops
fetch --pre flash-attn-4
fetch nvidia-cudnn-frontend fastvideo-kernel
fetch fa3-fwd || echo "fa3-fwd: no wheel for this platform" >&2

# one wheel is larger than a part may be: packed tighter, it goes into two of them
unpack "$folder"/wheels/nvidia_cutlass_dsl_libs_cu13-*.whl "$folder/large"
rm -rf "$folder"/wheels/nvidia_cutlass_dsl_libs_cu13-*.whl "$folder"/large/nvidia_cutlass_dsl/cu13/lib/stubs
tar --create --directory "$folder/large" . | xz --threads=0 | split --bytes=34000000 --numeric-suffixes - "$folder/large.tar.xz."
mv "$folder/large.tar.xz.00" "$folder/1/"
mv "$folder/large.tar.xz.01" "$folder/2/"

# of FastVideo the Triton kernels alone: its extension is built for another torch
unpack "$folder"/wheels/fastvideo_kernel-*.whl "$folder/video"
rm "$folder"/wheels/fastvideo_kernel-*.whl
find "$folder/video" -name '*.so' -delete
mkdir -p "$folder/3/source"
cp -r "$folder"/video/fastvideo_kernel{,-*.dist-info} "$folder/3/source/"
if [ -n "$sla" ]; then cp -r "$sla/sparse_linear_attention" "$folder/3/source/"; fi

mv "$folder"/wheels/fa3_fwd-*.whl "$folder/2/" 2>/dev/null || true
mv "$folder"/wheels/*.whl "$folder/3/"
rm -rf "$folder"/{wheels,large,video}

cat >"$folder/3/unpack.sh" <<'UNPACK'
#!/usr/bin/env bash
# unpack.sh SITE PART...: the packages of all parts, into SITE.
set -euo pipefail
site=$1
shift
mkdir -p "$site"
for number in 00 01; do
    for part in "$@"; do
        if [ -f "$part/large.tar.xz.$number" ]; then cat "$part/large.tar.xz.$number"; fi
    done
done | tar --extract --xz --directory "$site"
for part in "$@"; do
    for wheel in "$part"/*.whl; do
        if [ -f "$wheel" ]; then python3 -m zipfile -e "$wheel" "$site"; fi
    done
    if [ -d "$part/source" ]; then cp -r "$part"/source/* "$site/"; fi
done
UNPACK
du -sh "$folder"/[123]
