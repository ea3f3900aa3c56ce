#!/usr/bin/env bash
# Trains the embedded family in some ten minutes of one GPU, the most valuable first:
#
#     bash configs/emoji_minutes.sh emoji64.npz emoji256.npz FOLDER
#
# Base (two trainings), upsampler, few-step student. Each has a time limit of its own and a learning
# rate that falls to zero within it. While one trains, the programs of the next are compiled. The
# weights are in FOLDER/weights, those of the newest checkpoint where the script was stopped early.
#
# Minutes are set by the variables START, BASE, UPSAMPLER and STUDENT (0: no student). BATCH,
# UPSAMPLER_BATCH and EXTRA ("--model.model-channels 32") are for rehearsals on a CPU.
set -uo pipefail
data64=$(realpath "$1") data256=$(realpath "$2")
mkdir -p "$3/weights" "$3/logs"
out=$(realpath "$3")
cd "$(dirname "$0")/.."
start=${START:-2.2} base=${BASE:-4.6} upsampler=${UPSAMPLER:-1.5} student=${STUDENT:-1.7}
trial=${TRIAL:-45} batch=${BATCH:-256} extra=${EXTRA:-}
began=$SECONDS
note() { echo "[$((SECONDS - began)) s] $*"; }

train() { # LOG RECIPE RUN [OPTION ...]: all trainings share the card, each takes a quarter of it
    # shellcheck disable=SC2086
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.23 python3 train.py --config "$2" --out "$3" \
        --batch-size "$batch" --on-bad-step skip $extra "${@:4}" >"$out/logs/$1.log" 2>&1
}
losses() { tr '\r' '\n' <"$out/logs/$1.log" | grep -o 'loss [0-9.]*' | uniq; }
trained() { losses "$1" | wc -l; }
mean_loss() { losses "$1" | tail -n 4 | awk '{ s += $2 } END { print (NR ? s / NR : 9) }'; }
export_() { # NAME
    [ -d "$out/$1/checkpoints" ] || return 0
    JAX_PLATFORMS=cpu python3 -m glide_jax weights export "$out/$1" "$out/weights/$1.new" \
        >"$out/logs/export_$1.log" 2>&1 &&
        rm -rf "$out/weights/$1" && mv "$out/weights/$1.new" "$out/weights/$1" && note "exported $1"
}
first=(--data.source "$data64" --minutes "$start")
second=(--data.source "$data64")

# -- the first training, begun with two optimisers; the better one after TRIAL seconds goes on -----
train muon emoji64:eleven-styles "$out/muon" "${first[@]}" --optimiser.kind muon &
muon=$!
train adamw emoji64:eleven-styles "$out/adamw" "${first[@]}" --optimiser.kind adamw \
    --optimiser.learning-rate 1e-3 &
adamw=$!
until [ "$(trained muon)" -ge 2 ] && [ "$(trained adamw)" -ge 2 ]; do
    kill -0 $muon 2>/dev/null && kill -0 $adamw 2>/dev/null || break
    sleep 1
done
note "both optimisers run"
sleep "$trial"
note "loss with muon $(mean_loss muon), with adamw $(mean_loss adamw)"
if awk "BEGIN { exit !($(mean_loss muon) <= $(mean_loss adamw)) }"; then
    kind=muon rate=1.5e-3 running=$muon other=$adamw
else
    kind=adamw rate=1e-3 running=$adamw other=$muon
fi
pkill -KILL -P $other
note "$kind goes on"
chosen=(--optimiser.kind "$kind" --optimiser.learning-rate "$rate")

# -- meanwhile: the programs of the others -------------------------------------------------------
train warm_base emoji64 "$out/warm_base" "${second[@]}" --init-from '' --minutes 0.001 \
    "${chosen[@]}" &
train warm_upsampler emoji_upsample256 "$out/warm_upsampler" --data.source "$data256" \
    --batch-size "${UPSAMPLER_BATCH:-128}" --minutes 0.001 &
warm=$!
wait $running
note "first training: $(mean_loss $kind)"
# A step of the student costs about twice that of the base.
speed=$(tr '\r' '\n' <"$out/logs/$kind.log" | grep -o '[0-9.]* images/s' | tail -n 1 | cut -d' ' -f1)
steps=$(awk "BEGIN { n = int($student * 60 * $speed / $batch / 2 / 20) * 20; print (n < 20 ? 0 : n) }")
note "$speed images/s; $steps steps of the student"

# -- base and upsampler ----------------------------------------------------------------------------
wait $warm
train emoji64 emoji64 "$out/emoji64" "${second[@]}" --init-from "$out/$kind" --minutes "$base" \
    "${chosen[@]}" &
running=$!
train emoji_upsample256 emoji_upsample256 "$out/emoji_upsample256" --data.source "$data256" \
    --batch-size "${UPSAMPLER_BATCH:-128}" --minutes "$upsampler"
note "upsampler: $(mean_loss emoji_upsample256)"
export_ emoji_upsample256
# The student's program depends on its teacher's sizes alone: compiled from the base so far.
if [ "$steps" -gt 0 ] && [ -d "$out/emoji64/checkpoints" ]; then
    train warm_student emoji_fewstep64 "$out/warm_student" "${second[@]}" \
        --distillation.teacher "$out/emoji64" --init-from "$out/emoji64" --steps "$steps" \
        --minutes 0.001 --optimiser.kind "$kind"
    note "student compiled"
fi
wait $running
note "base: $(mean_loss emoji64)"
export_ emoji64 &

# -- student -----------------------------------------------------------------------------------------
if [ "$steps" -gt 0 ]; then
    train emoji_fewstep64 emoji_fewstep64 "$out/emoji_fewstep64" "${second[@]}" \
        --distillation.teacher "$out/emoji64" --init-from "$out/emoji64" --steps "$steps" \
        --minutes 9 --optimiser.kind "$kind"
    note "student: $(mean_loss emoji_fewstep64)"
    export_ emoji_fewstep64
fi
wait
note "done"
