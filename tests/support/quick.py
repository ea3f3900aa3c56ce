"""How the tests' programs are compiled."""

# Most of a test's time is the compiler's: a third less if it does not try hard. The results are as
# good.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
