/*
 * libvirt_sse_xts: a faster XTS mode for QEMU processes whose QEMU uses the nettle library.
 *
 * Nettle calls the cipher function once for each block of 16 bytes. Preloaded (LD_PRELOAD), this library
 * replaces nettle_xts_encrypt_message and nettle_xts_decrypt_message:
 *
 *   AES      by AES-NI or VAES, if the processor has the instructions, see aes.h
 *   others   all tweaks first, then one call of the cipher function for up to 4 KiB
 *
 * All other messages go to nettle: lengths that are no multiple of 16, buffers that overlap partly, and, after
 * a failed self-test, every message. Constant in time as far as the cipher function is; no system call after
 * the library is loaded; key schedules are read in place; the stack is wiped.
 *
 * Environment, for tests: VIRT_SSE_XTS selects a path (nettle, portable, aesni, vaes256, vaes512), and
 * VIRT_SSE_XTS_STATISTICS names a file to which the numbers of calls are appended at exit.
 */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "aes.h"

#define EXPORTED __attribute__((visibility("default"))) /* with version NETTLE_8, see nettle_8.map */
#define ENCRYPT "nettle_xts_encrypt_message"
#define DECRYPT "nettle_xts_decrypt_message"

typedef void cipher_function(const void *context, size_t length, uint8_t *dst, const uint8_t *src);
typedef void encrypt_function(
    const void *context, const void *tweak_context, cipher_function *cipher,
    const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src);
typedef void decrypt_function(
    const void *context, const void *tweak_context, cipher_function *cipher, cipher_function *tweak_cipher,
    const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src);
typedef void set_key_function(void *context, const uint8_t *key);

enum { BLOCK = 16, CHUNK = 4096, LONGEST_CONTEXT = 16384, PROBED = 3 * BLOCK, FUNCTIONS = 32 };

/* Where a cipher function reads AES round keys in its context. NONE: the function is not AES. */
enum layout { UNPROBED, NONE, ENCRYPT_128, ENCRYPT_256, DECRYPT_128, DECRYPT_256, SECOND_128, SECOND_256, LAYOUTS };

/* DECRYPT_*: one decryption schedule, nettle's own functions. SECOND_*: an encryption schedule, then a
 * decryption schedule, QEMU's functions. */
static const struct {
    int rounds;
    bool encrypt, second;
} LAYOUT[LAYOUTS] = {
    [ENCRYPT_128] = {10, true, false}, [ENCRYPT_256] = {14, true, false},
    [DECRYPT_128] = {10, false, false}, [DECRYPT_256] = {14, false, false},
    [SECOND_128] = {10, false, true}, [SECOND_256] = {14, false, true},
};

static const struct kernel {
    const char *name;
    bool (*present)(void);
    kernel_function *xts;
} KERNELS[] = {
    {"vaes512", has_vaes512, vaes512_xts},
    {"vaes256", has_vaes256, vaes256_xts},
    {"aesni", has_aesni, aesni_xts},
};
enum { KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS };

/* Nettle's own functions; AES by 128 and 256 bits of key. */
static struct {
    encrypt_function *encrypt;
    decrypt_function *decrypt;
    cipher_function *aes_encrypt[2], *aes_decrypt[2];
} nettle;

static bool portable; /* false: all messages go to nettle */
static const struct kernel *kernel;
static bool reversed[2]; /* by 128 and 256 bits: nettle stores the decryption keys in the encryption's order */

/* Contexts with known keys, and the result of the function that fits; constant after loading. */
static struct probe {
    _Alignas(64) uint8_t context[LONGEST_CONTEXT];
    uint8_t result[PROBED];
} probes[LAYOUTS];

/* The probed functions: address | layout << 56. QEMU unloads no code that contains a cipher function. */
static _Atomic uint64_t functions[FUNCTIONS];

static const char *statistics;
static atomic_ulong fast_calls, portable_calls, nettle_calls;

static void count(atomic_ulong *calls)
{
    if (statistics)
        atomic_fetch_add_explicit(calls, 1, memory_order_relaxed);
}

static size_t schedule_size(int rounds)
{
    return BLOCK * (size_t)(rounds + 1);
}

static struct schedule schedule_in(const uint8_t *context, enum layout layout)
{
    const int rounds = LAYOUT[layout].rounds;
    if (LAYOUT[layout].second)
        context += schedule_size(rounds);
    if (!LAYOUT[layout].encrypt && reversed[rounds == 14])
        return (struct schedule){context + BLOCK * rounds, -BLOCK, rounds};
    return (struct schedule){context, BLOCK, rounds};
}

static void probe_message(uint8_t *message)
{
    for (int i = 0; i < PROBED; i++)
        message[i] = (uint8_t)(0x11 * i);
}

static enum layout probe(cipher_function *cipher)
{
    uint8_t message[PROBED], result[PROBED];
    probe_message(message);
    for (enum layout layout = ENCRYPT_128; layout < LAYOUTS; layout++) {
        cipher(probes[layout].context, PROBED, result, message);
        if (memcmp(result, probes[layout].result, PROBED) == 0)
            return layout;
    }
    return NONE;
}

static enum layout layout_of(cipher_function *cipher)
{
    const uint64_t address = (uintptr_t)cipher, mask = UINT64_C(0xff) << 56;
    if (address & mask)
        return NONE;
    enum layout found = UNPROBED;
    for (int i = 0; i < FUNCTIONS; i++) {
        uint64_t entry = atomic_load_explicit(&functions[i], memory_order_relaxed);
        if (entry == 0) {
            if (found == UNPROBED)
                found = probe(cipher);
            if (atomic_compare_exchange_strong(&functions[i], &entry, address | (uint64_t)found << 56))
                return found;
        }
        if ((entry & ~mask) == address)
            return (enum layout)(entry >> 56);
    }
    return NONE;
}

/* Overwrite the stack below the caller: the kernels' frames, with spilled round keys, are shorter. */
static __attribute__((noinline)) void wipe_stack(void)
{
    uint8_t frame[1280];
    explicit_bzero(frame, sizeof frame);
}

static bool aes(
    const struct kernel *kernel, bool encrypt, const void *context, const void *tweak_context,
    cipher_function *cipher, cipher_function *tweak_cipher,
    const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src)
{
    const enum layout data = layout_of(cipher), tweaks = layout_of(tweak_cipher);
    if (data == NONE || LAYOUT[data].encrypt != encrypt || !LAYOUT[tweaks].encrypt
        || LAYOUT[data].rounds != LAYOUT[tweaks].rounds)
        return false;
    kernel->xts(
        encrypt, schedule_in(context, data), schedule_in(tweak_context, tweaks), tweak, length / BLOCK, dst, src);
    wipe_stack();
    return true;
}

static inline uint64_t load(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline void store(uint8_t *at, uint64_t value)
{
    memcpy(at, &value, sizeof value);
}

static void xor(uint8_t *dst, const uint8_t *a, const uint8_t *b, size_t length)
{
    for (size_t i = 0; i < length; i += 8)
        store(dst + i, load(a + i) ^ load(b + i));
}

static void any_cipher(
    const void *context, const void *tweak_context, cipher_function *cipher, cipher_function *tweak_cipher,
    const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src)
{
    uint8_t first[BLOCK], tweaks[CHUNK];
    tweak_cipher(tweak_context, BLOCK, first, tweak);
    uint64_t low = load(first), high = load(first + 8);
    while (length > 0) {
        const size_t now = length < CHUNK ? length : CHUNK;
        for (size_t i = 0; i < now; i += BLOCK) {
            store(tweaks + i, low);
            store(tweaks + i + 8, high);
            const uint64_t carry = high >> 63;
            high = high << 1 | low >> 63;
            low = low << 1 ^ (0x87 & -carry);
        }
        xor(dst, src, tweaks, now);
        cipher(context, now, dst, dst);
        xor(dst, dst, tweaks, now);
        dst += now;
        src += now;
        length -= now;
    }
    explicit_bzero(first, sizeof first);
    explicit_bzero(tweaks, sizeof tweaks);
}

static bool suitable(size_t length, const uint8_t *dst, const uint8_t *src)
{
    const uintptr_t to = (uintptr_t)dst, from = (uintptr_t)src;
    return portable && length >= BLOCK && length % BLOCK == 0 && (to == from || to - from >= length)
        && (to == from || from - to >= length);
}

/* A function of nettle; the second way finds a nettle that was loaded later, with a module of QEMU. */
static void *find(const char *name)
{
    void *found = dlvsym(RTLD_NEXT, name, "NETTLE_8");
    if (!found) {
        void *library = dlopen("libnettle.so.8", RTLD_LAZY | RTLD_NOLOAD);
        if (library)
            found = dlvsym(library, name, "NETTLE_8");
    }
    return found;
}

/* Nettle's own XTS. The functions are looked up again if nettle was loaded after this library. */
static void by_nettle(
    bool encrypt, const void *context, const void *tweak_context, cipher_function *cipher,
    cipher_function *tweak_cipher, const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src)
{
    if (encrypt) {
        encrypt_function *own = nettle.encrypt ? nettle.encrypt : (encrypt_function *)find(ENCRYPT);
        own(context, tweak_context, cipher, tweak, length, dst, src);
    } else {
        decrypt_function *own = nettle.decrypt ? nettle.decrypt : (decrypt_function *)find(DECRYPT);
        own(context, tweak_context, cipher, tweak_cipher, tweak, length, dst, src);
    }
}

static void message(
    bool encrypt, const void *context, const void *tweak_context, cipher_function *cipher,
    cipher_function *tweak_cipher, const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src)
{
    if (!suitable(length, dst, src)) {
        count(&nettle_calls);
        by_nettle(encrypt, context, tweak_context, cipher, tweak_cipher, tweak, length, dst, src);
    } else if (kernel && aes(kernel, encrypt, context, tweak_context, cipher, tweak_cipher, tweak, length, dst, src)) {
        count(&fast_calls);
    } else {
        count(&portable_calls);
        any_cipher(context, tweak_context, cipher, tweak_cipher, tweak, length, dst, src);
    }
}

EXPORTED void nettle_xts_encrypt_message(
    const void *context, const void *tweak_context, cipher_function *cipher,
    const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src)
{
    message(true, context, tweak_context, cipher, cipher, tweak, length, dst, src);
}

EXPORTED void nettle_xts_decrypt_message(
    const void *context, const void *tweak_context, cipher_function *cipher, cipher_function *tweak_cipher,
    const uint8_t *tweak, size_t length, uint8_t *dst, const uint8_t *src)
{
    message(false, context, tweak_context, cipher, tweak_cipher, tweak, length, dst, src);
}

/* Fill the probes for one length of key: 0 for 128 bits, 1 for 256. False if nettle's AES differs from FIPS 197,
 * appendix C. */
static bool fill_probes(int length)
{
    static const char *const names[2][4] = {
        {"nettle_aes128_set_encrypt_key", "nettle_aes128_set_decrypt_key",
         "nettle_aes128_encrypt", "nettle_aes128_decrypt"},
        {"nettle_aes256_set_encrypt_key", "nettle_aes256_set_decrypt_key",
         "nettle_aes256_encrypt", "nettle_aes256_decrypt"},
    };
    static const uint8_t expected[2][BLOCK] = {
        {0x69, 0xc4, 0xe0, 0xd8, 0x6a, 0x7b, 0x04, 0x30, 0xd8, 0xcd, 0xb7, 0x80, 0x70, 0xb4, 0xc5, 0x5a},
        {0x8e, 0xa2, 0xb7, 0xca, 0x51, 0x67, 0x45, 0xbf, 0xea, 0xfc, 0x49, 0x90, 0x4b, 0x49, 0x60, 0x89},
    };
    set_key_function *set_encrypt_key = (set_key_function *)find(names[length][0]);
    set_key_function *set_decrypt_key = (set_key_function *)find(names[length][1]);
    nettle.aes_encrypt[length] = (cipher_function *)find(names[length][2]);
    nettle.aes_decrypt[length] = (cipher_function *)find(names[length][3]);
    if (!set_encrypt_key || !set_decrypt_key || !nettle.aes_encrypt[length] || !nettle.aes_decrypt[length])
        return false;

    struct probe *encrypt = &probes[ENCRYPT_128 + length], *decrypt = &probes[DECRYPT_128 + length];
    struct probe *second = &probes[SECOND_128 + length];
    const size_t size = schedule_size(LAYOUT[ENCRYPT_128 + length].rounds);
    uint8_t key[2][32], message[PROBED];
    for (int i = 0; i < 32; i++) {
        key[0][i] = (uint8_t)i;
        key[1][i] = (uint8_t)(0xf0 - i);
    }
    probe_message(message);

    set_encrypt_key(encrypt->context, key[1]);
    set_decrypt_key(decrypt->context, key[1]);
    /* The first decryption key is the last encryption key, unless nettle stores the decryption keys reversed. */
    reversed[length] = memcmp(decrypt->context, encrypt->context, BLOCK) == 0;
    nettle.aes_decrypt[length](decrypt->context, PROBED, decrypt->result, message);

    set_encrypt_key(encrypt->context, key[0]);
    nettle.aes_encrypt[length](encrypt->context, PROBED, encrypt->result, message);
    memcpy(second->context, encrypt->context, size);
    memcpy(second->context + size, decrypt->context, size);
    memcpy(second->result, decrypt->result, PROBED);
    return memcmp(encrypt->result, expected[length], BLOCK) == 0;
}

/* Whether *candidate*, or the portable path if NULL, ciphers messages of several lengths as nettle does. */
static bool agrees_with_nettle(const struct kernel *candidate)
{
    static const size_t lengths[] = {BLOCK, 7 * BLOCK, 32 * BLOCK, 61 * BLOCK};
    uint8_t input[61 * BLOCK], expected[sizeof input], result[sizeof input], tweak[BLOCK];
    for (size_t i = 0; i < sizeof input; i++)
        input[i] = (uint8_t)(i * i >> 3);
    memset(tweak, 0xa5, sizeof tweak);
    for (int aes_256 = 0; aes_256 < 2; aes_256++) {
        const void *tweak_context = probes[ENCRYPT_128 + aes_256].context;
        cipher_function *tweak_cipher = nettle.aes_encrypt[aes_256];
        for (int encrypt = 0; encrypt < 2; encrypt++) {
            const void *context = encrypt ? tweak_context : probes[DECRYPT_128 + aes_256].context;
            cipher_function *cipher = encrypt ? tweak_cipher : nettle.aes_decrypt[aes_256];
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                by_nettle(encrypt, context, tweak_context, cipher, tweak_cipher, tweak, lengths[i], expected, input);
                if (!candidate)
                    any_cipher(context, tweak_context, cipher, tweak_cipher, tweak, lengths[i], result, input);
                else if (!aes(candidate, encrypt, context, tweak_context, cipher, tweak_cipher, tweak, lengths[i],
                              result, input))
                    return false;
                if (memcmp(result, expected, lengths[i]) != 0)
                    return false;
            }
        }
    }
    return true;
}

__attribute__((constructor)) static void choose_path(void)
{
    statistics = secure_getenv("VIRT_SSE_XTS_STATISTICS");
    const char *wanted = secure_getenv("VIRT_SSE_XTS");
    nettle.encrypt = (encrypt_function *)find(ENCRYPT);
    nettle.decrypt = (decrypt_function *)find(DECRYPT);
    if ((wanted && strcmp(wanted, "nettle") == 0) || !nettle.encrypt || !nettle.decrypt
        || !fill_probes(0) || !fill_probes(1))
        return;
    portable = agrees_with_nettle(NULL);
    if (!portable)
        return;
    for (int i = 0; i < KERNEL_COUNT && !kernel; i++)
        if ((!wanted || strcmp(wanted, KERNELS[i].name) == 0) && KERNELS[i].present()
            && agrees_with_nettle(&KERNELS[i]))
            kernel = &KERNELS[i];
}

__attribute__((destructor)) static void write_statistics(void)
{
    FILE *file = statistics ? fopen(statistics, "ae") : NULL;
    if (!file)
        return;
    fprintf(file, "%s %lu portable %lu nettle %lu\n", kernel ? kernel->name : portable ? "portable" : "nettle",
            fast_calls, portable_calls, nettle_calls);
    fclose(file);
}
