#!/usr/bin/env bash
# Makes all embedded weights from the raw SVGs: bash configs/emoji_family.sh FOLDER
#
# Needs a GPU, `pip install '.[data,cuda]'`, npm and apt-get. The same command resumes after an
# interruption: files that exist are kept, and trainings resume from their newest checkpoint.
# Base and upsampler end by the clock, in the times of one H200. configs/emoji_minutes.sh
# trains them side by side instead, together with a few-step student.
# The script was not run as a whole.
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
    python -m glide_jax train --config "$1" --out "$out/$2" --data.source "$out/$3" "${@:4}"
}
train emoji64:eleven-styles emoji64_eleven_styles emoji64.npz
train emoji64 emoji64 emoji64.npz --init-from "$out/emoji64_eleven_styles"
train emoji_upsample256 emoji_upsample256 emoji256.npz
# Both crop at random, which a loader does on the host.
train emoji_clip64 emoji_clip64 emoji64.npz --data.workers 4
train emoji_clip64:scorer emoji_scorer64 emoji64.npz --data.workers 4

for name in emoji64 emoji_upsample256 emoji_clip64 emoji_scorer64; do
    [ -e "$out/weights/$name" ] ||
        python -m glide_jax weights export "$out/$name" "$out/weights/$name"
done
echo "weights, to replace those in glide_jax/assets: $out/weights"
