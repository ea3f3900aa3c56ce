"""The same measurements of the original PyTorch code; `benchmarks.speed --original` runs this.

python benchmarks/speed_original.py COPY_OF_GLIDE_TEXT2IM MEASUREMENT_AS_JSON

It needs torch and the requirements of the original code, which it imports from the path. It imports
nothing from glide-jax. Weights are random; nothing is downloaded.
"""

import json
import resource
import statistics
import sys
import time

TOY_STEPS = 10
QUEUED = 10
PROMPT = "a corgi wearing a red bowtie"


def options_of(name, size, half):
    """Return the settings of OpenAI's models, or those of the toy (`speed_parts.toy`)."""
    from glide_text2im import model_creation

    if name == "base":
        options = model_creation.model_and_diffusion_defaults()
        options["timestep_respacing"] = "100"
    else:
        options = model_creation.model_and_diffusion_defaults_upsampler()
        options["timestep_respacing"] = "fast27"
    options |= {"use_fp16": half, "cache_text_emb": True}
    if size == "toy":
        options |= {"num_channels": 32, "num_res_blocks": 1, "num_head_channels": 32}
        options |= {"text_ctx": 32, "xf_width": 64, "xf_layers": 2, "xf_heads": 2}
        if name == "base":
            options |= {"image_size": 16, "channel_mult": "1,2", "attention_resolutions": "8"}
            options["timestep_respacing"] = str(TOY_STEPS)
        else:
            options |= {"image_size": 64, "channel_mult": "1,1,2,2", "attention_resolutions": "8"}
    return options


def build(name, size, device):
    """Return model, diffusion and settings, with normal weights of variance 1 / inputs."""
    import torch
    from glide_text2im.model_creation import create_model_and_diffusion

    options = options_of(name, size, device.type == "cuda")
    with device:
        model, diffusion = create_model_and_diffusion(**options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_().mul_(parameter[0].numel() ** -0.5)
    model.eval()
    if options["use_fp16"]:
        model.convert_to_fp16()
    return model.to(device), diffusion, options


def conditions(model, options, device, captions):
    """Return the tokens and the mask of captions."""
    import torch

    tokens, masks = [], []
    for caption in captions:
        encoded = model.tokenizer.encode(caption)
        ids, mask = model.tokenizer.padded_tokens_and_mask(encoded, options["text_ctx"])
        tokens.append(ids)
        masks.append(mask)
    mask = torch.tensor(masks, dtype=torch.bool, device=device)
    return {"tokens": torch.tensor(tokens, device=device), "mask": mask}


def forward(network, name, batch, device):
    """Return a function that runs a forward pass, with cached text features as in the notebook."""
    import torch

    model, _, options = network
    inputs = conditions(model, options, device, [PROMPT] * batch)
    side = options["image_size"]
    x = torch.randn(batch, 3, side, side, device=device)
    if name == "upsampler":
        inputs["low_res"] = torch.rand(batch, 3, side // 4, side // 4, device=device) * 2 - 1
    t = torch.full((batch,), 500, device=device)
    return lambda: model(x, t, **inputs)


def with_guidance(model):
    """Return the function of the notebook text2im that guides a model, for pairs of images."""
    import torch

    def guided(x, t, **inputs):
        half = x[: len(x) // 2]
        out = model(torch.cat([half, half]), t, **inputs)
        eps, rest = out[:, :3], out[:, 3:]
        cond, null = eps.chunk(2)
        eps = null + 3.0 * (cond - null)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    return guided


def procedure(base_network, large_network, batch, device):
    """Return a function that runs the notebook text2im: guided ancestral steps, then upsampling."""
    import torch

    base, base_diffusion, base_options = base_network
    large, large_diffusion, large_options = large_network
    captions = [PROMPT] * batch + [""] * batch
    guided_inputs = conditions(base, base_options, device, captions)
    large_inputs = conditions(large, large_options, device, [PROMPT] * batch)

    def generate():
        side = base_options["image_size"]
        small = base_diffusion.p_sample_loop(
            with_guidance(base),
            (2 * batch, 3, side, side),
            device=device,
            clip_denoised=True,
            progress=False,
            model_kwargs=guided_inputs,
            cond_fn=None,
        )[:batch]
        base.del_cache()
        low_res = ((small + 1) * 127.5).round() / 127.5 - 1
        side = large_options["image_size"]
        generated = large_diffusion.ddim_sample_loop(
            large,
            (batch, 3, side, side),
            noise=torch.randn(batch, 3, side, side, device=device) * 0.997,
            device=device,
            clip_denoised=True,
            progress=False,
            model_kwargs={"low_res": low_res, **large_inputs},
            cond_fn=None,
        )
        large.del_cache()
        return generated.cpu()

    return generate


def main():
    """Make one measurement and print it as JSON."""
    path, arguments = sys.argv[1], json.loads(sys.argv[2])
    sys.path.insert(0, path)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    size, batch, whole = arguments["size"], arguments["batch"], arguments["kind"] == "procedure"
    with torch.no_grad():
        if whole:
            networks = [build(name, size, device) for name in ("base", "upsampler")]
            call = procedure(*networks, batch, device)
        else:
            name = arguments["model"]
            call = forward(build(name, size, device), name, batch, device)
        queued = QUEUED if on_gpu and not whole else 1
        for _ in range(1 if whole else 2):
            call()
        wait()
        times = []
        for _ in range(min(arguments["repeats"], 3) if whole else arguments["repeats"]):
            start = time.perf_counter()
            for _ in range(queued):
                call()
            wait()
            times.append((time.perf_counter() - start) * 1000 / queued)
    ms = statistics.median(times)
    if on_gpu:
        kind = torch.cuda.get_device_name()
        peak, of = torch.cuda.max_memory_allocated(), "device"
    else:
        kind = "cpu"
        peak, of = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"
    found = {
        "ms": ms,
        "all_ms": times,
        "images_s": batch * 1000 / ms,
        "dtype": "float16" if on_gpu else "float32",
        "peak_bytes": peak,
        "peak_of": of,
        "machine": f"{kind}; the original code, torch {torch.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
