# Two commands do everything: make book, make test. The rest is for authors and teachers; make help lists it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONWARNINGS := ignore::DeprecationWarning

.DEFAULT_GOAL := help
.PHONY: book test serve execute record classroom benchmark profile colab clean help

book: $(READY)  ## build the HTML book from the stored outputs
	$(BIN)/jupyter-book build . --toc book/_toc.yml --quiet -W --keep-going
	@echo "The book is at $(CURDIR)/_build/html/index.html  (make serve opens it on a local port)"

test: $(READY)  ## check everything: code style, kernels, chapters, the book in a browser
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m tests.browser
	$(BIN)/python -m pytest -n 2 --dist loadscope tests
	OMP_NUM_THREADS=1 SEQARCH_EXPLORE=stored TQDM_DISABLE=1 \
	$(BIN)/python -m pytest -n 2 --dist loadscope --nbval-lax -p no:cacheprovider chapters book

serve: book  ## build the book and serve it on http://localhost:8000
	$(BIN)/python -m http.server 8000 --bind localhost --directory _build/html

execute: $(READY)  ## run chapters and store their outputs (CHAPTER=04 for one)
	$(BIN)/python -m seqarch.publishing execute $(CHAPTER)

record: $(READY)  ## run a chapter at full scale and store its measurements (CHAPTER=04)
	$(if $(CHAPTER),,$(error name a chapter: make record CHAPTER=04))
	$(BIN)/python -m seqarch.publishing record $(CHAPTER)

classroom: $(READY)  ## write copies of the chapters without solutions to _build/classroom
	$(BIN)/python -m seqarch.publishing classroom $(CHAPTER)

benchmark: $(READY)  ## time the kernels against their peers on this machine
	$(BIN)/python -m benchmarks

profile: $(READY)  ## what to read when a kernel is slow: registers, spills, bandwidth (KERNEL=linear_scan CHIP=90)
	$(if $(KERNEL),,$(error name a kernel: make profile KERNEL=linear_scan))
	$(BIN)/python -m benchmarks.codegen $(or $(CHIP),90) $(KERNEL)
	$(BIN)/python -m benchmarks $(KERNEL)

colab: $(READY)  ## try in a bare environment what happens on Colab (CHAPTER=01)
	$(BIN)/python -m tests.colab $(CHAPTER)

clean:  ## remove what was built (the environment stays; rm -r .venv removes it)
	rm -rf _build .pytest_cache .ruff_cache .hypothesis dist

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

# The environment is made once, and again when the package's needs change. Versions are those of constraints.txt.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@
