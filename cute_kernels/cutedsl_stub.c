/* The only symbol of the DSL's runtime library that a compiled kernel needs: raises a CUDA error as a Python error. */
#include <stdio.h>

extern const char *cudaGetErrorString(int error);

typedef void (*raise_function)(const char *kind, const char **parts, int count);

void CuteDSLRT_TVMFFISetRaisedCudaError(raise_function raise, int error) {
    char number[32];
    const char *parts[3] = {"CUDA: ", NULL, number};
    if (!raise) return;
    snprintf(number, sizeof number, " (error %d)", error);
    parts[1] = cudaGetErrorString(error);
    raise("RuntimeError", parts, 3);
}
