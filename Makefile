# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all lint methods bench pvp retrieval clean

demo: .venv/installed
	$(BIN)/bench cache build --backbone sample:minilm-l6 --task sample:tweets --limit 800
	$(BIN)/bench compare --backbone sample:minilm-l6 --task sample:tweets --limit 800 \
		--methods linear_probe,unipt,lst,lora,vpt --seeds 0,1 --epochs 3

test: .venv/installed
	$(BIN)/pytest -m "not long" -n auto --dist worksteal

test-all: .venv/installed
	$(BIN)/pytest -n auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

methods: .venv/installed
	$(BIN)/python -m sidebench.adapters._registry README.md

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

# PVP: pre-train prompts and low-rank updates on one task, then tune them on few examples of another. docs/pvp.md
TARGET ?= digits
PVP := --backbone sample:dinov2-small --image-size 56
pvp: .venv/installed
	$(BIN)/bench pretrain $(PVP) --task sample:mnist-5k --method vpt --epochs 1 --batch-size 80 --zero-shot sample:digits --out runs/pvp/vpt.safetensors
	$(BIN)/bench pretrain $(PVP) --task sample:mnist-5k --method lora --epochs 1 --batch-size 80 --zero-shot sample:digits --out runs/pvp/lora.safetensors
	$(BIN)/bench compare $(PVP) --task sample:$(TARGET) --shots 1,2,4,8,16 --seeds 0,1,2 --steps 40 --batch-size 16 \
		--methods linear_probe,vpt,vpt@runs/pvp/vpt.safetensors,lora,lora@runs/pvp/lora.safetensors

# Two towers of real weights, tuned to find captions and images of each other. docs/retrieval.md
retrieval: .venv/installed
	$(BIN)/bench compare --backbone pair:image=sample:dinov2-small,text=sample:minilm-l6 --task sample:digit-scenes \
		--image-size 112 --methods unipt --seeds 0 --epochs 10

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
