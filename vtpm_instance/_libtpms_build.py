"""Declaration of the C functions the instance uses; build input for the generated module `_libtpms`.

Out-of-line ABI mode: the generated module is plain Python, so no compiler is needed at installation and no
declaration is parsed at run time (parsing costs 5 MB and 30 ms in each process, reference/performance.md 2a).

Source: libtpms 0.9.2, tpm_library.h, tpm_tis.h and tpm_nvfilename.h; libseccomp 2.5.4, seccomp.h; linux/filter.h;
prctl(2), unshare(2), mount(2), syscall(2), declared with all its arguments: they are words on every 64-bit Linux.
"""

from cffi import FFI

CDEF = """
typedef uint32_t TPM_RESULT;
typedef unsigned char TPM_BOOL;
typedef uint32_t TPM_MODIFIER_INDICATOR;
struct libtpms_callbacks {
    int sizeOfStruct;
    TPM_RESULT (*tpm_nvram_init)(void);
    TPM_RESULT (*tpm_nvram_loaddata)(unsigned char **, uint32_t *, uint32_t, const char *);
    TPM_RESULT (*tpm_nvram_storedata)(const unsigned char *, uint32_t, uint32_t, const char *);
    TPM_RESULT (*tpm_nvram_deletename)(uint32_t, const char *, TPM_BOOL);
    TPM_RESULT (*tpm_io_init)(void);
    TPM_RESULT (*tpm_io_getlocality)(TPM_MODIFIER_INDICATOR *, uint32_t);
    TPM_RESULT (*tpm_io_getphysicalpresence)(TPM_BOOL *, uint32_t);
};
TPM_RESULT TPMLIB_RegisterCallbacks(struct libtpms_callbacks *);
uint32_t TPMLIB_GetVersion(void);
TPM_RESULT TPMLIB_ChooseTPMVersion(int);
TPM_RESULT TPMLIB_MainInit(void);
void TPMLIB_Terminate(void);
TPM_RESULT TPMLIB_Process(unsigned char **, uint32_t *, uint32_t *, unsigned char *, uint32_t);
TPM_RESULT TPMLIB_VolatileAll_Store(unsigned char **, uint32_t *);
TPM_RESULT TPMLIB_CancelCommand(void);
uint32_t TPMLIB_SetBufferSize(uint32_t, uint32_t *, uint32_t *);
TPM_RESULT TPMLIB_SetState(int, const unsigned char *, uint32_t);
char *TPMLIB_GetInfo(int);
TPM_RESULT TPM_IO_Hash_Start(void);
TPM_RESULT TPM_IO_Hash_Data(const unsigned char *, uint32_t);
TPM_RESULT TPM_IO_Hash_End(void);
TPM_RESULT TPM_IO_TpmEstablished_Get(TPM_BOOL *);
TPM_RESULT TPM_IO_TpmEstablished_Reset(void);
void TPMLIB_SetDebugFD(int);
int TPMLIB_SetDebugLevel(unsigned int);
int TPMLIB_SetDebugPrefix(const char *);
TPM_RESULT TPMLIB_SetProfile(const char *);

void *malloc(size_t);
void free(void *);
int prctl(int, ...);
int unshare(int);
int mount(const char *, const char *, const char *, unsigned long, const char *);
int umount2(const char *, int);
int mprotect(void *, size_t, int);
long syscall(long, long, long, long, long, long);

struct scmp_arg_cmp {
    unsigned int arg;
    int op;
    uint64_t datum_a;
    uint64_t datum_b;
};
void *seccomp_init(uint32_t);
void seccomp_release(void *);
int seccomp_attr_set(void *, int, uint32_t);
int seccomp_rule_add_array(void *, uint32_t, int, unsigned int, const struct scmp_arg_cmp *);
int seccomp_syscall_resolve_name(const char *);
int seccomp_export_bpf(const void *, int);

struct sock_fprog {
    unsigned short len;
    void *filter;
};
"""

ffi = FFI()
ffi.cdef(CDEF)
ffi.set_source("vtpm_instance._libtpms", None)
