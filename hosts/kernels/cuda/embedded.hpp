// A file as text in the library, ended by a zero: what a GPU's compiler reads. MIRROR_CUDA_FOLDER is where it lies.
#pragma once

#define MIRROR_EMBEDDED(symbol, file)          \
  __asm__(                                     \
      ".pushsection .rodata\n"                 \
      ".globl " #symbol                        \
      "\n"                                     \
      ".hidden " #symbol "\n" #symbol          \
      ":\n"                                    \
      ".incbin \"" MIRROR_CUDA_FOLDER "/" file \
      "\"\n"                                   \
      ".byte 0\n"                              \
      ".popsection\n");                        \
  extern "C" __attribute__((visibility("hidden"))) const char symbol[]
