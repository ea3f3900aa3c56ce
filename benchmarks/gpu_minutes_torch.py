"""The rows of the original for `benchmarks.gpu_minutes`, which starts this module as a process.

It imports nothing of glide-jax. Rows of "original" run it as published: float16 on a GPU, not
compiled. Rows of "original, compiled" give it what torch offers: its networks go through
`torch.compile`, with CUDA graphs ("reduce-overhead") for one image and the default mode for more,
in bfloat16 and channels_last, with cuDNN's choice of convolutions by timing. The published float16
becomes bfloat16 module by module, so the same parts stay float32. Text features are computed once
a run and kept, without the comparison of tokens in each step that would wait for the GPU and break
the graph. The sampler around the network is the published one. Not tried: "max-autotune", whose
compilation takes minutes.
"""

import json
import resource
import sys
import time
from functools import cache, partial

import torch

from benchmarks.gpu_minutes_rows import COMPILED, end_with_parent, say, serve, timed
from benchmarks.speed_original import (
    PROMPT,
    build,
    conditions,
    forward,
    procedure,
    with_guidance,
)

TASK = json.loads(sys.argv[1])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# The first steps of a run, to measure one.
STEPS = 20 if ON_GPU else 2


class Compiled:
    """A network of the original, compiled; with the interface of the original's."""

    def __init__(self, model, mode):
        self.tokenizer = model.tokenizer
        self.encode = model.get_text_emb
        self.features = None
        self.fresh = False
        model.cache_text_emb = False
        model.requires_grad_(False)
        if ON_GPU:
            for parameter in model.parameters():
                if parameter.dtype == torch.float16:
                    parameter.data = parameter.data.bfloat16()
            model.dtype = torch.bfloat16
        model.to(memory_format=torch.channels_last)
        model.get_text_emb = lambda tokens, mask: self.features
        self.call = torch.compile(model, mode=mode, dynamic=False)

    def __call__(self, x, t, tokens, mask, **inputs):
        if not self.fresh:
            found = self.encode(tokens, mask)
            if self.features is None:
                self.features = {name: value.clone() for name, value in found.items()}
            # The compiled program reads them where they are.
            for name, value in found.items():
                self.features[name].copy_(value)
            self.fresh = True
        if ON_GPU:
            torch.compiler.cudagraph_mark_step_begin()
        return self.call(x.contiguous(memory_format=torch.channels_last), t, **inputs)

    def del_cache(self):
        """Forget the text features, as the original's method does."""
        self.fresh = False


@cache
def network(name, mode):
    """Return model, diffusion and settings of base or upsampler; compiled if there is a mode."""
    model, diffusion, options = build(name, TASK["size"], DEVICE)
    return (Compiled(model, mode) if mode else model), diffusion, options


def step(made, name, batch):
    """Return a function that runs the first steps of the notebook's loops."""
    model, diffusion, options = made
    side, captions = options["image_size"], [PROMPT] * batch
    if name == "base":
        inputs = conditions(model, options, DEVICE, captions + [""] * batch)
        sample = partial(diffusion.p_sample, with_guidance(model))
    else:
        inputs = conditions(model, options, DEVICE, captions)
        inputs["low_res"] = torch.rand(batch, 3, side // 4, side // 4, device=DEVICE) * 2 - 1
        sample = partial(diffusion.ddim_sample, model)
    start = torch.randn(len(inputs["tokens"]), 3, side, side, device=DEVICE)

    def run():
        x = start
        for i in range(diffusion.num_timesteps - 1, diffusion.num_timesteps - 1 - STEPS, -1):
            t = torch.tensor([i] * len(x), device=DEVICE)
            x = sample(x, t, clip_denoised=True, model_kwargs=inputs)["sample"]
        return x

    return run


def measure(row):
    """Measure a row of any kind."""
    mode = None
    if row.code == COMPILED:
        mode = "reduce-overhead" if row.batch == 1 else "default"
        torch.backends.cudnn.benchmark = True
    names = ["base", "upsampler"] if row.model == "both" else [row.model]
    made = [network(name, mode) for name in names]
    for model, _, _ in made:
        model.del_cache()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    if row.kind == "forward":
        call = forward(made[0], row.model, row.batch, DEVICE)
    elif row.kind == "step":
        call = step(made[0], row.model, row.batch)
    else:
        call = procedure(made[0], made[1], row.batch, DEVICE)

    def wait(result):
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        say(stage="compiling" if mode else "warming up")
        began = time.perf_counter()
        wait(call())
        first = time.perf_counter() - began
        say(stage="running")
        once = row.kind != "forward"
        times = timed(
            call,
            wait,
            seconds=3.0 if once else 2.0,
            queued=1 if once else 10,
            # Graphs are recorded in the second call; a procedure finds its programs compiled.
            warm=0 if row.kind == "procedure" else 2,
            parts=STEPS if row.kind == "step" else 1,
        )
    ran = times["ms"] / 1000 * (STEPS if row.kind == "step" else 1)
    found = {"compile_s": round(first - ran, 2)} if mode else {}
    return found | times | details(mode)


def details(mode):
    """Return the machine, the memory and, of a compiled network, what was not compiled."""
    kind = torch.cuda.get_device_name() if ON_GPU else "cpu"
    if ON_GPU:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "device": kind,
        "peak_bytes": peak,
        "machine": f"{kind}; the original code, torch {torch.__version__}",
    }
    if mode:
        counted = torch._dynamo.utils.counters
        found["graph_breaks"] = sum(counted["graph_break"].values())
        found["graph_skips"] = counted["inductor"].get("cudagraph_skips", 0)
        found["mode"] = mode
    return found


def main():
    """Measure the rows of the command line."""
    end_with_parent()
    sys.path.insert(0, TASK["original"])
    serve(TASK["rows"], measure)


if __name__ == "__main__":
    main()
