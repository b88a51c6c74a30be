PYTHON ?= python3
PY := .venv/bin/python
UV := .venvs/uv/bin/uv

# Options of both trainings; a quick look: make demo DEMO_OPTIONS="--num-iter 40 --num-warmup 10"
DEMO_OPTIONS ?=
# bfloat16 where the CPU has instructions for it; elsewhere it takes three times as long as float32.
DEMO_PRECISION ?= $(shell grep -qs bf16 /proc/cpuinfo && echo bf16 || echo no)
DEMO_COMPUTE := --batch-size 32 --precision $(if $(filter bf16,$(DEMO_PRECISION)),bf16,fp32)
TRAIN_DEMO := --mixed-precision $(DEMO_PRECISION) $(DEMO_OPTIONS)
DEMO := work_dir/demo
PAIRS := data/sentinel_demo
DEMO_PARTS := test unseen
MEAN_OF_8 := --preset fast --ensemble 8 --ensemble-output mean
# The number of simulated scenes: make demo-simulated DEMO_TRAIN=256
DEMO_TRAIN ?= 4096
DEMO_TEST ?= 160
SIMULATED := work_dir/simulated
# Scenes that a small network can learn in minutes: what no SAR shows is kept moderate, and the speckle as well.
DEMO_SCENES := --looks 9 --parcel-px 40 --texture 0.4 --p-eo-only 0.2

.PHONY: demo demo-simulated notebook test test-versions faults fuzz lint types lock clean

demo: .venv/installed
	rm -rf $(DEMO)
	$(PY) main.py --config configs/demo.yaml $(TRAIN_DEMO)
	$(PY) main.py --config configs/demo_conf.yaml $(TRAIN_DEMO)
	$(PY) calibrate.py --checkpoint $(DEMO)/stage2/best --sar-dir $(PAIRS)/test/sar --eo-dir $(PAIRS)/test/eo \
		$(DEMO_COMPUTE) $(MEAN_OF_8)
	for part in $(DEMO_PARTS); do \
		translate="$(PY) test.py --sar-dir $(PAIRS)/$$part/sar --checkpoint $(DEMO)/stage2/best $(DEMO_COMPUTE)"; \
		sample=$(DEMO)/translated/$$part/sample; mean=$(DEMO)/translated/$$part/mean; \
		$$translate --output-dir $$sample/eo --conf-dir $$sample/confidence --variance-dir $$sample/variance && \
		$$translate $(MEAN_OF_8) --output-dir $$mean/eo --variance-dir $$mean/variance \
			--spread-dir $$mean/spread --error-dir $$mean/error || exit 1; \
	done
	$(PY) demo/report.py --scenes $(PAIRS) --parts $(DEMO_PARTS) --translated $(DEMO)/translated --base assets/sentinel_base \
		--calibration $(DEMO)/stage2/best/calibration.json --output $(DEMO)

demo-simulated: .venv/installed
	rm -rf $(SIMULATED) data/simulated
	$(PY) data/simulate.py --output data/simulated --train $(DEMO_TRAIN) --test $(DEMO_TEST) $(DEMO_SCENES)
	$(PY) main.py --config configs/simulated.yaml $(TRAIN_DEMO)
	$(PY) main.py --config configs/simulated_conf.yaml $(TRAIN_DEMO)
	$(PY) test.py --sar-dir data/simulated/test/sar --checkpoint $(SIMULATED)/stage2/best --batch-size 32 \
		--output-dir $(SIMULATED)/translated/test/sample/eo --conf-dir $(SIMULATED)/translated/test/sample/confidence \
		--variance-dir $(SIMULATED)/translated/test/sample/variance
	$(PY) demo/report.py --scenes data/simulated --translated $(SIMULATED)/translated --base assets/simulated_base --output $(SIMULATED)

# With the demo's model.
notebook: .venv/installed
	.venv/bin/jupyter-execute notebooks/quickstart.ipynb

# Two at a time, of one thread each; several processes of two threads would only wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
TEST_OPTIONS ?= --numprocesses 2 --dist worksteal
test: .venv/installed
	$(ONE_THREAD) $(PY) -m pytest $(TEST_OPTIONS)

# The tests on the lowest versions that pyproject.toml allows and on the newest: what a reader's environment may hold.
# Quicker: make test-versions VERSION_TESTS="tests/test_model.py tests/test_diffusion.py"
LOWEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13
VERSION_TESTS ?=
test-versions: .venvs/lowest/installed .venvs/newest/installed
	$(ONE_THREAD) .venvs/lowest/bin/python -m pytest $(TEST_OPTIONS) $(VERSION_TESTS)
	$(ONE_THREAD) .venvs/newest/bin/python -m pytest $(TEST_OPTIONS) $(VERSION_TESTS)

.venvs/lowest/installed: pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(LOWEST_PYTHON) .venvs/lowest
	$(UV) pip install --quiet --python .venvs/lowest/bin/python --resolution lowest-direct --editable ".[test]"
	touch $@

.venvs/newest/installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear .venvs/newest
	.venvs/newest/bin/pip install --quiet --editable ".[test]"
	touch $@

$(UV):
	$(PYTHON) -m venv .venvs/uv
	.venvs/uv/bin/pip install --quiet uv==0.13.9

# Dozens of SIGKILLs at random moments of training and translation, and 2,000 steps of each watched for leaks.
faults: .venv/installed
	$(PY) -m pytest -m long -s
	$(PY) benchmarks/soak.py

# Damaged and hostile configurations, lists and images, for so many seconds each; atheris is installed for this alone.
FUZZ_SECONDS ?= 60
fuzz: .venv/installed
	$(PY) -m pip install --quiet atheris==3.0.0
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -m fuzz -s tests/fuzz

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

types: .venv/installed
	$(PY) -m mypy

# Exact versions, which are those of the last run of the tests; without its lock a plain install takes the newest.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint requirements.lock --editable ".[test]"
	touch $@

# Keeps the versions that fit; make lock LOCK_OPTIONS=--upgrade takes the newest.
LOCK_OPTIONS ?=
lock: $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate --custom-compile-command "make lock" \
		$(LOCK_OPTIONS) pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .venvs *.egg-info work_dir data/simulated
