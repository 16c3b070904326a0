"""Speed on one NVIDIA GPU: keras-vit on JAX against timm with `torch.compile`, in bfloat16.

    pip install "jax[cuda12]" torch timm matplotlib && pip install .    # without TensorFlow
    python benchmarks/gpu.py              # --platform cpu --quick: tiny, to try

NOT YET RUN ON A CARD: tried on a CPU with tiny sizes alone.

S/16, B/16 and L/16 at 224 px, 1,000 classes, batches from 16 on until the card is full. `forward`
is inference, `training` a step: forward pass, cross-entropy, backward pass and AdamW's update,
weights in float32. The batch lies on the card. Ours computes under mixed_bfloat16 in one
`jax.jit`, its state donated; timm under autocast to bfloat16. MFU is twice the multiplications of
the matrix products (three times that for a step) over what the card could do (`--peak-tflops`); of
ours without what the last block leaves out.
Memory is the peak of the framework's allocator, of all batches up to this one.

Contenders do not take turns here: each has the card to itself for all of its batches, ours first,
since neither JAX nor PyTorch gives back what it has once taken. JAX may take 95% of the card
instead of its usual 75%, as it needs it.
"""

import os
import statistics
import subprocess

import models
from harness import Contender, compare, described, draw, markdown, parser, save, versions_line

OURS = "keras-vit"
SIZES = {  # hidden_dim, depth, num_heads, mlp_dim
    "S/16": (384, 12, 6, 1536),
    "B/16": (768, 12, 12, 3072),
    "L/16": (1024, 24, 16, 4096),
}
TINY = (64, 2, 2, 128)
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
PEAK_TFLOPS = {  # dense bfloat16, of NVIDIA's data sheets; part of the name -> 1e12 per second
    "H200": 989,
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
}


def ours(size, kind, side):
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16")
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


def contenders(size, kind, side, platform):
    variables = {
        "KERAS_BACKEND": "jax",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "JAX_PLATFORMS": platform,
    }
    options = {"size": size, "kind": kind, "side": side}
    return {
        OURS: Contender(ours, None, ("keras", "jax"), options, variables),
        "timm, compiled": Contender(
            timm,
            "timm" if platform == "cpu" else None,
            ("timm", "torch"),
            {**options, "device": platform},
            variables,
        ),
    }


def compare_alone(contenders, cases, **options):
    """`compare` of one contender after the other, as if of all."""
    alone = [compare({name: one}, cases, **options) for name, one in contenders.items()]
    return [
        {
            "case": case[0]["case"],
            "contenders": {k: v for one in case for k, v in one["contenders"].items()},
        }
        for case in zip(*alone, strict=True)
    ]


def card():
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

    kinds = [[g for g in result["groups"] if g["kind"] == kind] for kind in ("forward", "training")]
    draw(path, *([panel(group) for group in groups] for groups in kinds))


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--peak-tflops", type=float, help="of the card, dense bfloat16")
    arguments = arguments.parse_args()
    quick, groups = arguments.quick, []
    name = card() if arguments.platform == "cuda" else "a CPU: no figures to go by"
    peak = arguments.peak_tflops or peak_tflops(name)
    is_trial = quick or arguments.platform == "cpu"
    os.environ.setdefault("KERAS_BACKEND", "jax")  # `save` imports keras_vit
    side = 32 if quick else 224
    for variant, size in {"tiny": TINY}.items() if quick else SIZES.items():
        for kind in ("forward", "training"):
            print(f"{variant}, {kind}", flush=True)
            chosen = contenders(size, kind, side, arguments.platform)
            cases = compare_alone(
                chosen,
                (2, 4) if quick else BATCHES,
                rounds=2 if quick else 5,
                turn=0.1 if quick else 1.0,
            )
            counts = {one: models.multiplications(size, side, whole=one != OURS) for one in chosen}
            group = {"variant": variant, "kind": kind, "cases": cases}
            groups.append({**group, "multiplications": counts})
        save("gpu", is_trial, card=name, peak_tflops=peak, groups=groups)  # time may be short


if __name__ == "__main__":
    main()
