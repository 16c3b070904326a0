"""Speed on one NVIDIA GPU: keras-vit on JAX against timm with `torch.compile`, in bfloat16.

    pip install "jax[cuda12]" torch timm matplotlib && pip install .    # without TensorFlow
    python benchmarks/gpu.py              # --platform cpu --quick: tiny, to try

S/16, B/16 and L/16 at 224 px, 1,000 classes. `forward` is inference, `training` a step: forward
pass, cross-entropy, backward pass and AdamW's update, weights in float32. The batch lies on the
card. Ours computes under mixed_bfloat16 in one `jax.jit`, its state donated; timm under autocast to
bfloat16, by `torch.compile` with its defaults. "Without FlashAttention" is ours after
`keras.config.disable_flash_attention()`; with L/16 it is left out, to spare memory.

MFU is twice the multiplications of the matrix products (three times that for a step) over what the
card could do (`--peak-tflops`); of ours without what the last block leaves out. Memory is the peak
of the framework's allocator, of all batches up to this one.

Compiling takes longest, so that all of a size is compiled first, side by side, and kept on disk.
XLA chooses its kernels then, by timing them on a card that others use as well. The result is
written after each group, in place of the one before, so that a run that is stopped leaves what it
has measured.
"""

import os
import statistics
import subprocess
import tempfile

import models
from harness import (
    Contender,
    Process,
    compare,
    described,
    draw,
    markdown,
    parser,
    save,
    together,
    versions_line,
)

OURS, WITHOUT_FLASH = "keras-vit", "keras-vit without FlashAttention"
SIZES = {  # hidden_dim, depth, num_heads, mlp_dim
    "S/16": (384, 12, 6, 1536),
    "B/16": (768, 12, 12, 3072),
    "L/16": (1024, 24, 16, 4096),
}
TINY = (64, 2, 2, 128)
BATCHES = (8, 32, 128)
KINDS = ("forward", "training")
TURN = 0.5  # seconds
PEAK_TFLOPS = {  # dense bfloat16, of NVIDIA's data sheets; part of the name -> 1e12 per second
    "H200": 989,
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
}


def ours(size, kind, side, flash=True):
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16")
    if not flash:
        keras.config.disable_flash_attention()
    return models.ours_on_jax(size, kind, side)


def timm(size, kind, side, device):
    import timm
    import torch

    hidden_dim, depth, num_heads, mlp_dim = size
    model = timm.models.VisionTransformer(
        img_size=side,
        patch_size=models.PATCH,
        num_classes=models.CLASSES,
        embed_dim=hidden_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_dim / hidden_dim,
    ).to(device)
    model.train(kind == "training")
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    bfloat16 = torch.autocast(device, torch.bfloat16)

    def make(batch):
        images, labels = models.data(batch, side)
        images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
        labels = torch.from_numpy(labels).to(device)

        def forward():
            with torch.inference_mode(), bfloat16:
                compiled(images)

        def step():
            optimizer.zero_grad()
            with bfloat16:
                loss = torch.nn.functional.cross_entropy(compiled(images), labels)
            loss.backward()
            optimizer.step()

        def run(calls):
            for _ in range(calls):
                forward() if kind == "forward" else step()
            if device == "cuda":
                torch.cuda.synchronize()

        if device == "cuda":
            run.device_bytes = torch.cuda.max_memory_allocated
        return run

    return make, sum(weight.numel() for weight in model.parameters())


def contenders(size, kind, side, platform, folder):
    variables = {
        "KERAS_BACKEND": "jax",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "JAX_PLATFORMS": platform,
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
    }
    options = {"size": size, "kind": kind, "side": side}
    of_ours = (ours, None, ("keras", "jax"))
    chosen = {
        OURS: Contender(*of_ours, options, variables),
        WITHOUT_FLASH: Contender(*of_ours, {**options, "flash": False}, variables),
        "timm, compiled": Contender(
            timm,
            "timm" if platform == "cpu" else None,
            ("timm", "torch"),
            {**options, "device": platform},
            variables,
        ),
    }
    if size == SIZES["L/16"]:
        del chosen[WITHOUT_FLASH]
    return chosen


def compile_all(contenders, cases):
    """Each case of each contender once, side by side, for what is then found on disk.

    Args:
        contenders: Dictionary (kind, name) -> `Contender`; who fails is printed, with the reason.
        cases: As of `compare`.
    """

    def compile_one(process):
        try:
            process.start()
            for case in cases:
                process.ask(case=case, do="warm up")
        finally:
            process.close()  # gives back what it took of the card

    processes = {name: Process(one) for name, one in contenders.items()}
    together(compile_one, processes)
    for name, process in processes.items():
        if process.missing is not None:
            print(f"{' '.join(name)}: {process.missing}", flush=True)


def card_name():
    """The name of the GPU."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.check_output(command, text=True).splitlines()[0].strip()


def peak_tflops(name):
    """What a card can do in dense bfloat16, in 1e12 operations per second, or None."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def table(result):
    rows, versions, missing = [], {}, {}
    for group in result["groups"]:
        for case in group["cases"]:
            for name, entry in case["contenders"].items():
                versions |= entry.get("versions", {})
                where = f"{group['variant']}, {group['kind']}"
                if "missing" in entry:
                    missing.setdefault(f"{name}, {where}", (case["case"], entry["missing"]))
                else:
                    rows.append((where, case["case"], name, *cells(name, case, group, result)))
    columns = ("", "batch", "", "images/s: best, median", "MFU", "GB")
    parts = [f"{result['card']}\n", markdown(columns, rows)]
    parts += [f"{name} from batch {b} on: {why}\n" for name, (b, why) in missing.items()]
    return "\n".join([*parts, versions_line(versions), described(result)])


def cells(name, case, group, result):
    entry = case["contenders"][name]
    best, median = (case["case"] / f(entry["seconds"]) for f in (min, statistics.median))
    operations = 2 * group["multiplications"][name] * (3 if group["kind"] == "training" else 1)
    peak, memory = result["peak_tflops"], entry.get("device_bytes")
    mfu = f"{best * operations / (peak * 1e12):.1%}" if peak else ""
    return f"{best:,.0f}, {median:,.0f}", mfu, f"{memory / 1e9:.1f}" if memory else ""


def plot(result, path):
    """Images per second against the batch."""

    def panel(group):
        def curves(axes):
            for name in group["cases"][0]["contenders"]:
                entries = [(case["case"], case["contenders"][name]) for case in group["cases"]]
                entries = [(batch, entry) for batch, entry in entries if "missing" not in entry]
                speeds = [batch / min(entry["seconds"]) for batch, entry in entries]
                axes.loglog([batch for batch, _ in entries], speeds, "o-", label=name)
            axes.set_title(f"{group['variant']}, {group['kind']}: images/s")
            axes.set_xlabel("batch")
            axes.legend()

        return curves

    panels = [panel(group) for group in result["groups"]]
    panels += [lambda axes: axes.set_axis_off()] * (len(panels) % 2)  # if it was stopped
    draw(path, *zip(panels[::2], panels[1::2], strict=True))


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--peak-tflops", type=float, help="of the card, dense bfloat16")
    arguments = arguments.parse_args()
    quick, groups = arguments.quick, []
    card = card_name() if arguments.platform == "cuda" else "a CPU: no figures to go by"
    peak = arguments.peak_tflops or peak_tflops(card)
    is_trial = quick or arguments.platform == "cpu"
    # `save` imports keras_vit, which is not to take anything of the card.
    os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
    side, batches = (32, (2, 4)) if quick else (224, BATCHES)
    sizes = {"tiny": TINY} if quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        for variant, size in sizes.items():
            compared = {
                kind: contenders(size, kind, side, arguments.platform, folder) for kind in KINDS
            }
            print(f"{variant}: compiling", flush=True)
            compile_all(
                {(kind, name): one for kind in KINDS for name, one in compared[kind].items()},
                batches,
            )
            for kind, chosen in compared.items():
                print(f"{variant}, {kind}", flush=True)
                cases = compare(chosen, batches, rounds=2 if quick else 5, turn=TURN)
                counts = {
                    name: models.multiplications(size, side, whole=not name.startswith(OURS))
                    for name in chosen
                }
                group = {"variant": variant, "kind": kind, "cases": cases}
                groups.append({**group, "multiplications": counts})
                save("gpu", is_trial, card=card, peak_tflops=peak, groups=groups)


if __name__ == "__main__":
    main()
