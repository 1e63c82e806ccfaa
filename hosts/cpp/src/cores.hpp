// What the operating system says of this machine's CPU.
#pragma once

namespace mirror {

// The CPUs that this process may run on, hyper-threads counted each.
int allowed_cpus();

// Their physical cores; hyper-threads share one.
int physical_cores();

// Whether the CPU has Intel's matrix units, or nobody says that it hasn't: only Linux lists them.
bool may_have_amx();

// Whether an x86 CPU adds up products of 8 bits in 32, or nobody says that it doesn't.
bool may_have_vnni();

}  // namespace mirror
