// What the CUDA library says of itself: the architectures that it was compiled for, for `dnl info`.
#ifndef DNL_ARCHITECTURES
#define DNL_ARCHITECTURES "none, emulated"
#endif
extern "C" __attribute__((visibility("default"))) const char* dnl_cuda_architectures() { return DNL_ARCHITECTURES; }
