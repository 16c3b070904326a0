"""Which layers quantization costs most, and a higher precision for those that cost too much."""

import itertools

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from .benchmark import available_cores
from .quantization import FALLBACKS, RULES

_IMAGES = 16


class AccuracyLost(ValueError):
    """A mode loses more than is allowed, whatever its layers are given."""


def sensitivity(source, mode, images, advance=lambda: None):
    """What each layer of a quantized file costs by itself.

    Args:
        source: a `FloatFile`.
        mode: one of `RULES`.
        images: array (N, H, W, C); the first 16 are used.
        advance: called after every layer.

    Returns:
        Dictionary, layer name -> signal-to-noise ratio in dB of the outputs with that layer alone
        quantized; see `signal_to_noise`.
    """
    images = images[:_IMAGES]
    expected = run(source.content, images)
    ratios = {}
    for layer in source.layers(mode):
        outputs = run(source.quantize(layer.only(RULES[mode])), images)
        ratios[layer.name] = signal_to_noise(expected, outputs)
        advance()
    return ratios


def signal_to_noise(expected, outputs):
    """10 log10(sum s^2 / sum (outputs - expected)^2), s: what `expected` is above its mean image.

    What all images have in common is no signal, as it tells no class from another.

    Args:
        expected, outputs: arrays (N, classes), N >= 2; logits, or probabilities behind a softmax.

    Returns:
        dB, a float; infinite if both are equal.
    """
    signal = np.square(expected - expected.mean(axis=0)).sum(dtype="float64")
    noise = np.square(outputs - expected).sum(dtype="float64")
    return float("inf") if noise == 0 else float(10 * np.log10(signal / noise))


def quantize_within(
    source, mode, images, labels, max_drop, min_agreement, ratios, advance=lambda: None
):
    """Quantizes a file, with as few layers as need be at a higher precision.

    They are the worst ones by `ratios`: the least number, found by bisection, with which accuracy
    and agreement hold. If all of them at the first precision of `FALLBACKS` do not suffice, some
    get the next, too.

    Args:
        source: a `FloatFile`.
        mode: one of `RULES`.
        images: array (N, H, W, C) that neither trained nor calibrated the model.
        labels: int array `(N,)`.
        max_drop: how many percent of the images may be lost, in [0, 100].
        min_agreement: for how large a share of images like these, a in [0, 1], the file has to
            name the class that the float file names. Of these N images that is asked of a share
            larger by one standard error, sqrt(a (1 - a) / N): else, of files that just hold it
            here, half would not hold it on others.
        ratios: what `sensitivity` returned.
        advance: called after every file that was tried.

    Returns:
        The bytes of the file, and a dictionary, layer name -> precision, of the layers that do
        not have the mode's.

    Raises:
        AccuracyLost: if no number of layers suffices.
    """
    error = np.sqrt(min_agreement * (1 - min_agreement) / len(images))
    required = min(1.0, min_agreement + error)
    expected = run(source.content, images).argmax(axis=-1)
    worst = sorted(source.layers(mode), key=lambda layer: ratios[layer.name])
    drops, agreements = [], []

    def attempt(precisions):
        changed = (layer for layer in worst if layer.name in precisions)
        rules = RULES[mode] + tuple(layer.rule(precisions[layer.name]) for layer in changed)
        content = source.quantize(rules)
        classes = run(content, images).argmax(axis=-1)
        drops.append(100 * (np.mean(expected == labels) - np.mean(classes == labels)))
        agreements.append(np.mean(classes == expected))
        advance()
        holds = drops[-1] <= max_drop + 1e-9 and agreements[-1] >= required
        return content if holds else None

    precisions = {}
    best = attempt(precisions)
    for precision in FALLBACKS[mode]:
        if best is not None:
            break
        below = precisions
        nearest = {layer.name: layer.nearest(precision) for layer in worst}
        fallback = {of.name: nearest[of.name] for of in worst if of.precision != nearest[of.name]}
        too_few, enough, precisions = 0, len(fallback), {**below, **fallback}
        best = attempt(precisions)
        while best is not None and enough - too_few > 1:
            count = (too_few + enough) // 2
            tried = {**below, **dict(itertools.islice(fallback.items(), count))}
            content = attempt(tried)
            if content is None:
                too_few = count
            else:
                best, enough, precisions = content, count, tried
    if best is None:
        raise AccuracyLost(
            f"Mode {mode!r} cannot keep the accuracy, with no layer of those it can leave at a "
            f"higher precision. Expected: a drop of at most max_drop={max_drop} points, and the "
            f"float32 file's class for {required:.2%} of the images. Received: "
            f"{min(drops):.2f} points at the least and {max(agreements):.2%} at the most, of "
            f"{len(images)} images."
        )
    return best, precisions


def run(content, images):
    """Runs a `.tflite` file with float32 images (N, H, W, C), one by one -> (N, classes)."""
    interpreter = Interpreter(model_content=bytes(content), num_threads=available_cores())
    interpreter.allocate_tensors()
    (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    logits = []
    for values in images:
        interpreter.set_tensor(image["index"], values[None].astype("float32"))
        interpreter.invoke()
        logits.append(interpreter.get_tensor(output["index"])[0])
    return np.stack(logits)
