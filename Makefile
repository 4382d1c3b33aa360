# The test suite on every supported release of TRL, each in an environment of its own: `make versions`, or one of them
# with `make versions TRL=1.14`. The environments stay in .venv, so that a second run starts at once.
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
	  $$environment/bin/python -m pytest -q $(TESTS) > $$environment/report.txt 2>&1; \
	  status=$$?; tail -n 1 $$environment/report.txt; [ $$status -eq 0 ] || failed="$$failed $$trl"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }
