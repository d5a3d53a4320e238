"""UniPT on stage maps against a naive float64 reference of loops, its weights' sums, and the published count."""

import math
from collections.abc import Mapping

import pytest
import torch
from method_cases import Exact
from torch import Tensor, nn

from sidebench.adapters._tokens import relu_l1
from sidebench.adapters._unipt_parallel import confidences
from sidebench.adapters._unipt_stages import StageAnchor, cell_weights
from sidebench.adapters.unipt import Config, UniPT
from sidebench.cache.architecture import Architecture

GRIDS = {"stages.0": (8, 4), "stages.1": (4, 4), "stages.2": (2, 2)}  # cells of 4 x 2 and 2 x 2 pixels
WIDTHS = {"stages.0": 3, "stages.1": 4, "stages.2": 6}
EPS = 1e-5  # of a batch norm
Rows = list[list[float]]


def maps(examples: int = 3, *, seed: int = 0) -> Exact:
    generator = torch.Generator().manual_seed(seed)
    states = {
        name: torch.randn(examples, h * w, WIDTHS[name], generator=generator, dtype=torch.float64)
        for name, (h, w) in GRIDS.items()
    }
    masks = {name: torch.ones(state.shape[:2], dtype=torch.bool) for name, state in states.items()}
    return Exact(masks.pop("stages.2"), states, {}, masks)


def shaken(side: int = 4, width: int = 5) -> StageAnchor:
    """In float64, with norms away from 1 and 0 so that every term shows."""
    torch.manual_seed(0)
    body = StageAnchor(GRIDS, WIDTHS, side, width).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return body


def affine(linear: nn.Linear, row: list[float]) -> list[float]:
    weight, bias = linear.weight.tolist(), linear.bias.tolist()
    return [sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]


def batch_normed(norm: nn.BatchNorm1d, batch: list[Rows], statistics: tuple[Tensor, Tensor] | None) -> list[Rows]:
    """Each channel by its mean and (biased) variance over all pixels of all examples, or by the given ones."""
    channels = len(batch[0][0])
    out = [[[0.0] * channels for _ in rows] for rows in batch]
    for c in range(channels):
        values = [row[c] for rows in batch for row in rows]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        if statistics is not None:
            mean, variance = float(statistics[0][c]), float(statistics[1][c])
        gain, shift = norm.weight[c].item(), norm.bias[c].item()
        for e, rows in enumerate(batch):
            for r, row in enumerate(rows):
                out[e][r][c] = (row[c] - mean) / math.sqrt(variance + EPS) * gain + shift
    return out


def naive(body: StageAnchor, states: Mapping[str, list[Rows]], *, training: bool) -> list[Rows]:
    """Section 1.4 of the notes on methods: pixel by pixel, in the order of the text."""
    *guides, last = GRIDS
    rows, columns = GRIDS[last]
    examples = range(len(states[last]))

    def lin_norm(part: nn.Module, batch: list[Rows]) -> list[Rows]:
        mapped = [[affine(part.linear, row) for row in rows] for rows in batch]  # type: ignore[arg-type]
        norm = part.norm
        assert isinstance(norm, nn.BatchNorm1d)
        kept = (norm.running_mean, norm.running_var)
        return batch_normed(norm, mapped, None if training else kept)  # type: ignore[arg-type]

    anchor = lin_norm(body.down[-1], states[last])
    tokens = range(rows * columns)
    side = range(len(anchor[0][0]))
    results: list[list[Rows]] = []
    logits: list[list[float]] = []
    for index, name in enumerate(guides):
        height, width = GRIDS[name]
        down, across = height // rows, width // columns
        pooled: list[Rows] = []
        for e in examples:
            image = [[0.0] * WIDTHS[name] for _ in tokens]
            for t in tokens:
                top, left = t // columns * down, t % columns * across
                wanted = [max(v, 0.0) for v in affine(body.saliency[index], states[last][e][t])]  # type: ignore[arg-type]
                cell = [states[name][e][(top + i) * width + left + j] for i in range(down) for j in range(across)]
                salient = [max(sum(a * b for a, b in zip(pixel, wanted, strict=True)), 0.0) for pixel in cell]
                total = sum(salient) + 1e-8
                for pixel, s in zip(cell, salient, strict=True):
                    weight = s / total + 1 / (down * across)
                    image[t] = [x + weight * p for x, p in zip(image[t], pixel, strict=True)]
            pooled.append(image)
        guide = lin_norm(body.down[index], pooled)
        enriched: list[Rows] = []
        scores: list[float] = []
        for e in examples:
            shown = []
            for query in anchor[e]:
                row = [max(sum(a * b for a, b in zip(query, key, strict=True)), 0.0) for key in guide[e]]
                total = sum(row) + 1e-8
                shown.append([sum(row[k] / total * guide[e][k][c] for k in tokens) for c in side])
            enriched.append([[v + g for v, g in zip(shown[t], guide[e][t], strict=True)] for t in tokens])
            product = [
                sum(anchor[e][t][c] for t in tokens) / len(tokens) * sum(guide[e][t][c] for t in tokens) / len(tokens)
                for c in side
            ]
            scores.append(affine(body.gate, product)[0])
        results.append(enriched)
        logits.append(scores)
    merged = []
    for e in examples:
        weights = [math.exp(scores[e]) for scores in logits]
        merged.append(
            [
                [
                    sum(w * found[e][t][c] for w, found in zip(weights, results, strict=True)) / sum(weights)
                    for c in side
                ]
                for t in tokens
            ]
        )
    projected = lin_norm(body.project, merged)
    return [
        [affine(body.up, [max(anchor[e][t][c] + projected[e][t][c], 0.0) for c in side]) for t in tokens]
        for e in examples
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_stage_form_equals_the_formula(training: bool) -> None:
    body = shaken()
    body(maps(seed=5))  # so that the running statistics are those of no batch at hand
    body.train(training)
    batch = maps()
    wanted = naive(body, {name: batch.state(name).tolist() for name in GRIDS}, training=training)
    out = body(batch)
    assert out.shape == (3, 4, 5)
    torch.testing.assert_close(out, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_the_image_side_of_vse_has_6_433_537_parameters() -> None:
    channels = {f"stages.{i}": 256 * 2**i for i in range(4)}
    grids = {f"stages.{i}": (128 // 2**i, 128 // 2**i) for i in range(4)}
    body = StageAnchor(grids, channels, 512, 1024)
    assert sum(p.numel() for p in body.parameters()) == 6_433_537


def test_the_docstring_formula_counts_the_parameters() -> None:
    *guides, d = WIDTHS.values()
    m, e = 4, 5
    formula = sum(d * c + c for c in guides) + sum(c * m + m + 2 * m for c in (*guides, d))
    formula += m * m + m + 2 * m + m * e + e + m + 1
    assert sum(p.numel() for p in StageAnchor(GRIDS, WIDTHS, m, e).parameters()) == formula


def test_the_weights_of_a_cell_sum_to_2_or_to_1() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(50, 4, 4, 3, generator=generator, dtype=torch.float64)
    wanted = torch.relu(torch.randn(50, 4, 3, generator=generator, dtype=torch.float64))
    dull = (torch.einsum("btkc,btc->btk", cells, wanted) <= 0).all(-1)
    assert dull.any()
    assert not dull.all()
    weights = cell_weights(cells, wanted)
    assert (weights >= 1 / 4).all()
    torch.testing.assert_close(weights.sum(-1), 2 - dull.double(), atol=1e-5, rtol=0)
    assert (weights[dull] == 1 / 4).all()


def test_rows_of_the_map_sum_to_zero_or_one_and_confidences_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import sidebench.adapters._unipt_stages as stages

    seen: list[Tensor] = []

    def noting(scores: Tensor) -> Tensor:
        seen.append(relu_l1(scores))
        return seen[-1]

    monkeypatch.setattr(stages, "relu_l1", noting)
    body, batch = shaken(), maps()
    opened = body.open(batch)
    logits = [body.look(i, opened, batch)[1] for i in range(body.looks)]
    assert len(seen) == 2 * body.looks  # cells, then the map between the grids
    for rows in seen:
        sums = rows.sum(-1)
        dead = (rows == 0).all(-1)
        torch.testing.assert_close(sums, (~dead).double(), atol=1e-5, rtol=0)
    alpha = confidences(logits)
    assert alpha.shape == (3, 2)
    torch.testing.assert_close(alpha.sum(1), torch.ones(3, dtype=torch.float64))


def test_batch_norms_learn_statistics_while_training_only() -> None:
    body = shaken()
    before = {name: b.clone() for name, b in body.named_buffers()}
    body.eval()
    first = body(maps())
    assert all(torch.equal(b, before[name]) for name, b in body.named_buffers())
    alone = body(Exact(maps().mask[:1], {n: s[:1] for n, s in maps().activations.items()}, {}))
    torch.testing.assert_close(alone[0], first[0])  # in evaluation an example stands alone
    body.train()
    body(maps())
    assert not any(torch.equal(b, before[name]) for name, b in body.named_buffers())


def test_no_gradient_reaches_the_maps() -> None:
    body, batch = shaken(), maps()
    body(batch).square().sum().backward()
    assert all(v.grad is None and not v.requires_grad for v in batch.activations.values())
    dead = {n for n, p in body.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12}
    assert {n for n in dead if not n.endswith("linear.bias")} == {"gate.bias"}


def arch(*stages: tuple[int, int]) -> Architecture:
    last = f"stages.{len(stages) - 1}"
    return Architecture("Toy", "image", blocks=0, width=6, prefix_tokens=0, final_layer=last, stages=stages)


@pytest.mark.parametrize(
    ("stages", "config", "said"),
    [
        (((4, 4),), Config(), "two stage maps or more"),
        (((2, 2), (1, 1)), Config(), "a last map of more than one pixel"),
        (((7, 7), (3, 3)), Config(), "the 7 x 7 map stages.0 is no multiple of the last, 3 x 3"),
        (((4, 4), (2, 2)), Config(form="single_anchor"), "form single_anchor reads tokens"),
        (((4, 4), (2, 2)), Config(form="mlp"), "form mlp reads tokens"),
        (((4, 4), (2, 2)), Config(reduction=7), "reduction 7 leaves no side width of 6"),
    ],
)
def test_maps_that_cannot_be_brought_together_are_refused(
    stages: tuple[tuple[int, int], ...], config: Config, said: str
) -> None:
    assert said in str(UniPT(config).refusal(arch(*stages)))


def test_stage_maps_choose_their_form() -> None:
    seen = arch(*GRIDS.values())
    assert UniPT().refusal(seen) is None
    assert UniPT().layers(seen) == tuple(GRIDS)
    body = UniPT().build(seen, WIDTHS, lambda: pytest.fail("unipt starts from no backbone weights"))
    assert isinstance(body, StageAnchor)
    assert (body.width, body.gate.in_features) == (6, 3)
