"""The heads and the loss of grounding, against loops in float64 and the DETR loss of transformers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sidebench.bench.goals.box_head import BoxHead, Found
from sidebench.bench.goals.box_loss import Wanted, box_loss, box_losses, matched
from sidebench.bench.goals.overlap import centred, corners
from sidebench.cache.errors import SidebenchError

LEVELS, QUERIES, TOKENS, COUNTS = 2, 4, 5, (1, 2, 0, 3)


def test_the_heads_have_the_published_number_of_parameters_and_the_names_of_the_checkpoints() -> None:
    head = BoxHead(256)
    assert sum(p.numel() for p in head.parameters()) == 231_300
    assert set(head.state_dict()) == {
        f"{name}.{part}"
        for part in ("weight", "bias")
        for name in (
            "class_embed",
            *(f"bbox_embed.layers.{i}" for i in range(3)),
            *(f"contrastive_align_projection_{side}" for side in ("image", "text")),
        )
    }


def test_the_heads_yield_every_level_and_the_last_is_scored() -> None:
    torch.manual_seed(0)
    head = BoxHead(8)
    with torch.no_grad():
        found = head(3 * torch.randn(2, 3, 6, 8), torch.randn(3, 5, 8))
    assert found.logits.shape == (2, 3, 6, 256)
    assert found.boxes.shape == (2, 3, 6, 4)
    assert ((found.boxes > 0) & (found.boxes < 1)).all()
    torch.testing.assert_close(found.queries.norm(dim=-1), torch.ones(2, 3, 6))
    torch.testing.assert_close(found.tokens.norm(dim=-1), torch.ones(3, 5))
    scores, boxes = found.scored()
    for example, query in itertools.product(range(3), range(6)):
        logits = found.logits[-1, example, query].tolist()
        nothing = math.exp(logits[-1]) / math.fsum(map(math.exp, logits))
        assert scores[example, query].item() == pytest.approx(1 - nothing, abs=1e-9)
    assert torch.equal(boxes, corners(found.boxes[-1].double()))


def test_two_that_are_sure_are_no_tie() -> None:
    logits = torch.zeros(1, 1, 2, 256)
    logits[..., -1] = torch.tensor([-20.0, -21.0])
    scores, _ = Found(logits, torch.zeros(1, 1, 2, 4), torch.zeros(1), torch.zeros(1)).scored()
    assert scores[0, 0] < scores[0, 1]


def test_boxes_of_pixels_become_fractions_of_the_image() -> None:
    box = centred(torch.tensor([[10.0, 20, 40, 60]]), torch.tensor([[100.0, 200]]))
    assert box.flatten().tolist() == pytest.approx([0.3, 0.25, 0.4, 0.3])
    assert corners(box).flatten().tolist() == pytest.approx([0.1, 0.1, 0.5, 0.4])


def _case(seed: int = 0) -> tuple[Found, Wanted, Tensor]:
    """What is random, on two levels; boxes, some named by two tokens and one by none; texts of two lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = Found(
        3 * draw(LEVELS, len(COUNTS), QUERIES, 256),
        draw(LEVELS, len(COUNTS), QUERIES, 4).sigmoid(),
        torch.nn.functional.normalize(draw(LEVELS, len(COUNTS), QUERIES, 64), dim=-1),
        torch.nn.functional.normalize(draw(len(COUNTS), TOKENS, 64), dim=-1),
    )
    named = torch.zeros(sum(COUNTS), TOKENS, dtype=torch.bool)
    for box, token in ((0, 0), (0, 1), (1, 2), (2, 0), (3, 1), (4, 1), (4, 2)):
        named[box, token] = True
    mask = torch.ones(len(COUNTS), TOKENS, dtype=torch.bool)
    mask[1:, 3:] = False
    return found, Wanted((draw(sum(COUNTS), 4) / 2).sigmoid(), named, COUNTS), mask


def _giou(a: list[float], b: list[float]) -> float:
    def sides(box: list[float], axis: int) -> tuple[float, float]:
        return box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2

    shared = around = 1.0
    for axis in (0, 1):
        (a0, a1), (b0, b1) = sides(a, axis), sides(b, axis)
        shared *= max(0.0, min(a1, b1) - max(a0, b0))
        around *= max(a1, b1) - min(a0, b0)
    either = a[2] * a[3] + b[2] * b[3] - shared
    return shared / either - (around - either) / around


def _softmax(logits: list[float]) -> list[float]:
    parts = [math.exp(logit) for logit in logits]
    return [part / math.fsum(parts) for part in parts]


def _l1(a: list[float], b: list[float]) -> float:
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True))


def _naive_match(
    logits: list[list[float]], guesses: list[list[float]], boxes: list[list[float]], named: list[list[int]]
) -> tuple[int, ...]:
    """The query of every box, of all ways to give each its own the cheapest."""

    def cost(query: int, box: int) -> float:
        said = _softmax(logits[query])
        by_class = math.fsum(said[token] / len(named[box]) for token in named[box])
        return 5 * _l1(guesses[query], boxes[box]) - 2 * _giou(guesses[query], boxes[box]) - by_class

    ways = itertools.permutations(range(len(guesses)), len(boxes))
    return min(ways, key=lambda way: math.fsum(cost(query, box) for box, query in enumerate(way)))


def _naive_alignment(queries: list[list[float]], tokens: list[list[float]], pairs: set[tuple[int, int]]) -> float:
    similar = [[math.fsum(a * b for a, b in zip(q, t, strict=True)) / 0.07 for t in tokens] for q in queries]
    total = 0.0
    for q, row in enumerate(similar):
        own = [row[t] for t in range(len(tokens)) if (q, t) in pairs]
        total += math.log(math.fsum(map(math.exp, row))) - math.fsum(own) / len(own) if own else 0.0
    for t in range(len(tokens)):
        column = [row[t] for row in similar]
        own = [column[q] for q in range(len(queries)) if (q, t) in pairs]
        total += math.log(math.fsum(map(math.exp, column))) - math.fsum(own) / len(own) if own else 0.0
    return total / 2


def _naive(found: Found, wanted: Wanted, mask: Tensor) -> dict[str, float]:
    total = {"class": 0.0, "L1": 0.0, "GIoU": 0.0, "alignment": 0.0}
    for level, (example, count) in itertools.product(range(LEVELS), enumerate(COUNTS)):
        start = sum(COUNTS[:example])
        boxes = wanted.boxes[start : start + count].tolist()
        named = [[t for t in range(TOKENS) if wanted.named[start + box, t]] for box in range(count)]
        logits, guesses = found.logits[level, example].tolist(), found.boxes[level, example].tolist()
        match = _naive_match(logits, guesses, boxes, named)
        for query, row in enumerate(logits):
            said = [math.log(part) for part in _softmax(row)]
            if query in match:
                own = named[match.index(query)]
                total["class"] -= math.fsum(said[token] / len(own) for token in own)
            else:
                total["class"] -= 0.1 * said[-1]
        total["L1"] += math.fsum(_l1(guesses[query], box) for box, query in zip(boxes, match, strict=True))
        total["GIoU"] += math.fsum(1 - _giou(guesses[query], box) for box, query in zip(boxes, match, strict=True))
        real = int(mask[example].sum())
        pairs = {(query, token) for query, own in zip(match, named, strict=True) for token in own}
        total["alignment"] += _naive_alignment(
            found.queries[level, example].tolist(), found.tokens[example, :real].tolist(), pairs
        )
    return {name: loss / sum(COUNTS) for name, loss in total.items()}


@pytest.mark.parametrize("seed", range(5))
def test_losses_are_those_of_loops_over_levels_boxes_queries_and_tokens(seed: int) -> None:
    found, wanted, mask = _case(seed)
    naive = _naive(found, wanted, mask)
    losses = box_losses(found, wanted, mask)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(naive, abs=1e-9)
    weighted = naive["class"] + 5 * naive["L1"] + 2 * naive["GIoU"] + naive["alignment"]
    assert box_loss(found, wanted, mask).item() == pytest.approx(weighted, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_matching_and_box_losses_are_those_of_detr_where_a_box_has_one_token(seed: int) -> None:
    detr = pytest.importorskip("transformers.loss.loss_for_object_detection")
    found, wanted, mask = _case(seed)
    classes = torch.arange(sum(COUNTS)) % TOKENS
    wanted = Wanted(wanted.boxes, torch.nn.functional.one_hot(classes, TOKENS).bool(), COUNTS)
    targets = [
        {"class_labels": own, "boxes": boxes}
        for own, boxes in zip(classes.split(COUNTS), wanted.boxes.split(COUNTS), strict=True)
    ]
    matcher = detr.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    criterion = detr.ImageLoss(matcher, 255, 0.1, ["boxes"])
    level_losses = []
    for level, (box, query) in enumerate(matched(found, wanted)):
        outputs = {"logits": found.logits[level], "pred_boxes": found.boxes[level]}
        theirs = [
            (sum(COUNTS[:example]) + int(of_box), int(of_query))
            for example, (queries, boxes) in enumerate(matcher(outputs, targets))
            for of_query, of_box in zip(queries, boxes, strict=True)
        ]
        assert sorted(zip(box.tolist(), query.tolist(), strict=True)) == sorted(theirs)
        level_losses.append(criterion.loss_boxes(outputs, targets, matcher(outputs, targets), sum(COUNTS)))
    losses = box_losses(found, wanted, mask)
    for name, key in (("L1", "loss_bbox"), ("GIoU", "loss_giou")):
        assert losses[name].item() == pytest.approx(sum(level[key].item() for level in level_losses), abs=1e-9)


def test_padding_changes_no_loss_and_no_gradient() -> None:
    found, wanted, mask = _case()
    gradients = []
    for fill in (0.0, 7.0):
        tokens = torch.where(mask[..., None], found.tokens, fill).requires_grad_()
        queries = found.queries.clone().requires_grad_()
        box_loss(Found(found.logits, found.boxes, queries, tokens), wanted, mask).backward()
        assert tokens.grad is not None
        assert queries.grad is not None
        assert torch.isfinite(tokens.grad).all()
        assert not tokens.grad[~mask].any()
        gradients.append((tokens.grad[mask], queries.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_the_order_of_queries_changes_no_loss() -> None:
    found, wanted, mask = _case()
    order = torch.tensor([2, 0, 3, 1])
    moved = Found(found.logits[:, :, order], found.boxes[:, :, order], found.queries[:, :, order], found.tokens)
    assert box_loss(moved, wanted, mask).item() == pytest.approx(box_loss(found, wanted, mask).item(), abs=1e-9)


def test_more_boxes_than_queries_are_matched_as_far_as_they_go() -> None:
    found, wanted, mask = _case()
    few = Found(found.logits[:, :, :2], found.boxes[:, :, :2], found.queries[:, :, :2], found.tokens)
    for box, query in matched(few, wanted):
        assert sorted(box[:3].tolist()) == [0, 1, 2]
        assert len(box) == 5
        assert query.max() < 2
    assert torch.isfinite(box_loss(few, wanted, mask))


def test_a_run_that_diverges_is_seen_by_its_loss() -> None:
    found, wanted, mask = _case()
    assert torch.isnan(box_loss(Found(found.logits * math.nan, found.boxes, found.queries, found.tokens), wanted, mask))


def test_a_batch_without_boxes_only_says_no_object() -> None:
    found, _, mask = _case()
    nothing = Wanted(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, TOKENS, dtype=torch.bool), (0, 0, 0, 0))
    losses = box_losses(found, nothing, mask)
    assert losses["class"] > 0
    assert [losses[name].item() for name in ("L1", "GIoU", "alignment")] == [0, 0, 0]


def test_a_text_of_more_tokens_than_classes_is_refused() -> None:
    found, wanted, mask = _case()
    long = Wanted(wanted.boxes, torch.zeros(sum(COUNTS), 256, dtype=torch.bool), COUNTS)
    with pytest.raises(SidebenchError, match="256 tokens, and a box can be named by 255"):
        box_losses(found, long, mask)
