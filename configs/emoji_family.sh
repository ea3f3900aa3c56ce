#!/usr/bin/env bash
# Makes all embedded weights from the raw SVGs: bash configs/emoji_family.sh FOLDER
#
# Needs a GPU, `pip install '.[data,cuda]'`, npm and apt-get. The same command resumes after an
# interruption: files that exist are kept, and trainings resume from their newest checkpoint.
# The script was only smoke-tested, with two steps per training.
set -euo pipefail
out=${1:?name a folder: bash configs/emoji_family.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."

python -m glide_jax data fetch --to "$out/sources"
rasterise() { # FILE [OPTION ...]
    [ -e "$1" ] || python -m glide_jax data rasterise --sources "$out/sources" --out "$@"
}
rasterise "$out/emoji64.npz"
# The upsampler learns from four of the eleven styles: the others would fill 4 GB of memory.
rasterise "$out/emoji256.npz" --size 256 --vendors noto twemoji fluent-emoji-flat emojione

train() { # RECIPE RUN DATA [OPTION ...]
    python -m glide_jax train --config "$1" --out "$out/$2" --data.source "$out/$3" \
        --data.workers 4 "${@:4}"
}
train emoji64:concepts766 emoji64_concepts766 emoji64.npz
train emoji64 emoji64 emoji64.npz --init-from "$out/emoji64_concepts766"
train emoji_upsample256 emoji_upsample256 emoji256.npz
train emoji_inpaint64 emoji_inpaint64 emoji64.npz --init-from "$out/emoji64_concepts766"
train emoji_clip64 emoji_clip64 emoji64.npz
train emoji_clip64:scorer emoji_scorer64 emoji64.npz

for name in emoji64 emoji_upsample256 emoji_inpaint64 emoji_clip64 emoji_scorer64; do
    [ -e "$out/weights/$name" ] ||
        python -m glide_jax weights export "$out/$name" "$out/weights/$name"
done
echo "weights, to replace those in glide_jax/assets: $out/weights"
