#!/usr/bin/env bash
# Makes all embedded weights again, from the drawings on: bash configs/emoji_family.sh FOLDER
#
# Needs a GPU, `pip install '.[data,cuda]'`, npm and apt-get. What was made before is not made again,
# and a training that was interrupted goes on: so the same command goes on after a break.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?say where to: bash configs/emoji_family.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)

python -m glide_jax.data.emoji64 fetch --to "$out/sources"
draw() {
    [ -e "$1" ] || python -m glide_jax.data.emoji64 rasterise --sources "$out/sources" --out "$@"
}
draw "$out/emoji64.npz"
# The upsampler learns from four of the eleven styles: the others would be 4 GB of memory for nothing.
draw "$out/emoji256.npz" --size 256 --vendors noto twemoji fluent-emoji-flat emojione

# train RECIPE RUN DATA [OPTION ...]
train() {
    python train.py --config "configs/$1" --out "$out/$2" --data.source "$out/$3" \
        --data.workers 4 "${@:4}"
}
train emoji64.py:things emoji64_things emoji64.npz
train emoji64.py emoji64 emoji64.npz --init-from "$out/emoji64_things"
train emoji_upsample256.py emoji_upsample256 emoji256.npz
train emoji_inpaint64.py emoji_inpaint64 emoji64.npz --init-from "$out/emoji64_things"
train emoji_clip64.py emoji_clip64 emoji64.npz
train emoji_clip64.py:scorer emoji_scorer64 emoji64.npz

for name in emoji64 emoji_upsample256 emoji_inpaint64 emoji_clip64 emoji_scorer64; do
    [ -e "$out/weights/$name" ] ||
        python -m glide_jax.weights export "$out/$name" "$out/weights/$name"
done
echo "weights, ready to take the place of those in glide_jax/assets: $out/weights"
