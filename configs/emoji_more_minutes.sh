#!/usr/bin/env bash
# Trains the embedded family further in some ten minutes of one GPU, after configs/emoji_minutes.sh:
#
#     bash configs/emoji_more_minutes.sh emoji64.npz emoji256.npz FOLDER
#
# The few-step student of the embedded emoji64, then emoji64 and its upsampler, continued from the
# embedded weights with a learning rate that falls to zero. The weights are in FOLDER/weights.
#
# Minutes are set by the variables STUDENT, BASE and UPSAMPLER; BATCH and EXTRA are for rehearsals.
set -uo pipefail
data64=$(realpath "$1") data256=$(realpath "$2")
mkdir -p "$3/weights" "$3/logs"
out=$(realpath "$3")
cd "$(dirname "$0")/.."
student=${STUDENT:-2.5} base=${BASE:-5} upsampler=${UPSAMPLER:-2} batch=${BATCH:-256} extra=${EXTRA:-}
began=$SECONDS
note() { echo "[$((SECONDS - began)) s] $*"; }

train() { # RECIPE RUN [OPTION ...]
    # shellcheck disable=SC2086
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 python3 train.py --config "$1" --out "$out/$2" \
        --on-bad-step skip $extra "${@:3}" >>"$out/logs/$2.log" 2>&1
}
export_() { # NAME
    [ -d "$out/$1/checkpoints" ] || return 0
    JAX_PLATFORMS=cpu python3 -m glide_jax weights export "$out/$1" "$out/weights/$1.new" \
        >"$out/logs/export_$1.log" 2>&1 &&
        rm -rf "$out/weights/$1" && mv "$out/weights/$1.new" "$out/weights/$1" && note "exported $1"
}
low=(--optimiser.learning-rate 8e-4 --optimiser.lr-decay-share 1)

# The student decays by its steps: at 3,600 images/s alone, as many as its minutes hold.
steps=$(awk "BEGIN { print int($student * 60 * 3600 / $batch / 20 + 1) * 20 }")
train emoji_fewstep64 emoji_fewstep64 --data.source "$data64" --batch-size "$batch" \
    --distillation.teacher emoji64 --init-from emoji64 --steps "$steps" --minutes "$student" &
running=$!
# Meanwhile their programs are compiled.
train emoji64 warm_base --data.source "$data64" --init-from '' --minutes 0.001 \
    --batch-size "$batch" "${low[@]}"
train emoji_upsample256 warm_upsampler --data.source "$data256" --minutes 0.001 \
    --batch-size "${UPSAMPLER_BATCH:-128}" "${low[@]}"
wait $running
export_ emoji_fewstep64 &
train emoji64 emoji64 --data.source "$data64" --init-from emoji64 --minutes "$base" \
    --batch-size "$batch" "${low[@]}" &
running=$!
train emoji_upsample256 emoji_upsample256 --data.source "$data256" --init-from emoji_upsample256 \
    --minutes "$upsampler" --batch-size "${UPSAMPLER_BATCH:-128}" "${low[@]}"
export_ emoji_upsample256
wait $running
export_ emoji64
wait
note "done"
