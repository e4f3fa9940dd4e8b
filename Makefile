# Needs python3 (3.11 to 3.13) with venv; every target first makes .venv from requirements.lock.
#   make results/ressl_r18/linear.json [ARGS="--configfile ..."]     make test     make check     make ui
PYTHON ?= python3
CORES ?= all
ARGS ?=
BASE ?= HEAD
PORT ?= 5000
UV_VERSION := 0.13.8

BIN := .venv/bin
INSTALLED := .venv/.installed
# Where there is SLURM, Snakemake's plugin is installed too.
LOCKS := requirements.lock $(if $(shell command -v sbatch),requirements-slurm.lock)
# Programs of .venv come first, and no other environment of the shell is visible.
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
# Compiled modules are kept: without them each process compiles its imports again, torch's alone for more than a second.
unexport PYTHONDONTWRITEBYTECODE
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: all install test test-avx2 test-long test-slurm bench prove check format schema docs ui lock clean
.DELETE_ON_ERROR:
.SUFFIXES:

all: $(INSTALLED)
	snakemake --cores $(CORES) $(ARGS)

# Always runs Snakemake, which decides which files are out of date.
results/% shards/%: $(INSTALLED) FORCE
	snakemake --cores $(CORES) $@ $(ARGS)

FORCE:
Makefile pyproject.toml requirements.lock requirements-slurm.lock: ;

install: $(INSTALLED)

# The programs in .venv contain its path, and the package's: a project that was copied or moved installs anew, and a git
# worktree whose .venv is a link gets one of its own.
MOVED := $(shell [ ! -e $(BIN)/ssl-core ] || grep -qF "$$(pwd -P)/$(BIN)/" $(BIN)/ssl-core || echo yes)
ifneq ($(MOVED),)
.PHONY: $(INSTALLED)
endif

# The stamp is removed first and written last. Without it .venv is made anew, since an interrupted installation may have
# left half a package that pip and uv take for a whole one; downloads are cached.
$(INSTALLED): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; say make PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make environments: apt install python3-venv (Debian, Ubuntu), or say make PYTHON=python3.12" >&2; exit 1; }
	@[ -z "$(MOVED)" ] || { echo ".venv belongs to another folder (this one was copied or moved): installing anew"; rm -rf .venv; }
	[ -e $@ ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	rm -f $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV="$$(pwd -P)/.venv" $(BIN)/python -m uv pip sync --require-hashes $(LOCKS)
	VIRTUAL_ENV="$$(pwd -P)/.venv" $(BIN)/python -m uv pip install --no-deps --no-build-isolation --editable .
	pwd -P > $@

# Processes of one thread each, one more than cores, since many tests wait for Snakemake, a server or another process.
# The tests of a file run in one process and share its fixtures. Their files are in memory if it has 4 GB for files, since
# they would wait for a disk; they stay if a test fails.
FILES := $(shell [ "$$(df --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 4000000 ] 2>/dev/null && echo /dev/shm || echo /tmp)
PYTEST := folder=$$(mktemp -d -p $(FILES)) && TMPDIR=$$folder pytest --numprocesses $(shell echo $$(($$(nproc) + 1))) \
  --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(PYTEST) $(ARGS) && rm -rf $$folder

# The same on a processor's AVX2 instructions only: no AVX-512, no bfloat16.
test-avx2: $(INSTALLED)
	export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2; $(PYTEST) $(ARGS) && rm -rf $$folder

test-long: $(INSTALLED)
	$(PYTEST) --long $(ARGS) && rm -rf $$folder

# The workflow on a SLURM of two nodes on this machine, as root on Debian or Ubuntu: installs SLURM, starts it and ends it.
SLURM_PACKAGES := slurm-wlm slurmdbd mariadb-server munge
test-slurm:
	@[ "$$(id -u)" = 0 ] || { echo "error: SLURM's daemons need root: run it as root, for example in a container" >&2; exit 1; }
	dpkg --status $(SLURM_PACKAGES) >/dev/null 2>&1 || { apt-get update && apt-get install -y --no-install-recommends $(SLURM_PACKAGES); }
	$(MAKE) install --assume-new=requirements-slurm.lock
	pytest --slurm tests/slurm $(ARGS)

# Each prints a table and writes JSON; nothing else should run meanwhile. One of them: make bench BENCHMARKS=loader
BENCHMARKS := loader step neighbours sharding evaluation detection instance_loss workflow
bench: $(INSTALLED)
	mkdir -p build/benchmarks
	set -e; for name in $(BENCHMARKS); do python benchmarks/$$name.py --output build/benchmarks/$$name.json $(ARGS); done

# Compares the bytes of the working tree's code with those of a revision: make prove BASE=main [ARGS="--write"]
prove: $(INSTALLED)
	python workflow/prove.py $(BASE) $(ARGS)

check: $(INSTALLED)
	ruff check
	ruff format --check
	snakefmt --check Snakefile workflow
	pyright --warnings
	python workflow/lint.py

format: $(INSTALLED)
	ruff check --fix
	ruff format
	snakefmt Snakefile workflow

schema: $(INSTALLED)
	ssl-core schema > workflow/schemas/config.schema.json.new
	mv workflow/schemas/config.schema.json.new workflow/schemas/config.schema.json

# All documentation as a site in site/.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet $(ARGS)
	@echo "The site: $(CURDIR)/site/index.html"

ui: $(INSTALLED)
	ssl-core ui --port $(PORT)

lock: $(INSTALLED)
	uv pip compile pyproject.toml --extra dev --extra s3 --universal --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate --output-file requirements.lock
	python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["slurm"], sep="\n")' \
	  | uv pip compile - --no-deps --universal --generate-hashes --no-emit-index-url --no-header --no-annotate \
	  --python-version 3.11 --output-file requirements-slurm.lock
	printf '%s\n' 'typing-extensions>=4.13' 'backports-strenum<1.3' > overrides.txt # 1.3 is not for Python 3.11
	for extra in litert executorch; do \
	  python -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' $$extra \
	  | uv pip compile - --constraints requirements.lock --overrides overrides.txt --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --output-file requirements-$$extra.lock \
	  $$(sed -nE 's/^([A-Za-z0-9_.-]+)(\[.*\])?==.*/--no-emit-package \1/p' requirements.lock) || exit 1; \
	done
	rm overrides.txt
	printf '%s\n' 'moto[s3]' flask flask-cors | uv pip compile - --universal --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate --python-version 3.11 --output-file tests/data/moto.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache ssl_core.egg-info build
