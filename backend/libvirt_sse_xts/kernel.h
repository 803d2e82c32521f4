/*
 * AES-XTS of whole blocks, eight vectors at a time; included once per vector width.
 *
 * The including file defines TARGET, V (the vector), LANES (blocks per vector), NAME(x) and the operations
 * LOAD, STORE, XOR, ENC, ENC_LAST, DEC, DEC_LAST, SHIFT_LEFT, SHIFT_RIGHT (by bytes, per lane), CLMUL (low
 * quadwords), BROADCAST (one block to all lanes), and FIRST (multiplies a lane's tweak by x^(the lane's number)).
 */

#define GROUP 8
#define EACH _Pragma("GCC unroll 16") for

/* The tweaks of the next GROUP * LANES blocks: times x^(GROUP * LANES), a shift by LANES bytes. */
TARGET static inline __attribute__((always_inline)) V NAME(next)(V tweak, V polynomial)
{
    return XOR(SHIFT_LEFT(tweak, LANES), CLMUL(SHIFT_RIGHT(tweak, 16 - LANES), polynomial));
}

/* Fewer than GROUP * LANES blocks at a message's end. */
TARGET static __attribute__((noinline)) void NAME(rest)(
    bool encrypt, struct schedule data, const uint8_t *tweaks, size_t blocks, uint8_t *dst, const uint8_t *src)
{
    uint8_t partial[16 * LANES];
    while (blocks > 0) {
        size_t length = 16 * (blocks < LANES ? blocks : LANES);
        memcpy(partial, src, length);
        if (length < sizeof partial)
            memset(partial + length, 0, sizeof partial - length);
        V block = XOR(XOR(LOAD(partial), LOAD(tweaks)), BROADCAST(key(data, 0)));
        for (int round = 1; round < data.rounds; round++)
            block = encrypt ? ENC(block, BROADCAST(key(data, round))) : DEC(block, BROADCAST(key(data, round)));
        V last = BROADCAST(key(data, data.rounds));
        block = encrypt ? ENC_LAST(block, last) : DEC_LAST(block, last);
        STORE(partial, XOR(block, LOAD(tweaks)));
        memcpy(dst, partial, length);
        tweaks += sizeof partial;
        dst += length;
        src += length;
        blocks -= length / 16;
    }
    explicit_bzero(partial, sizeof partial);
}

TARGET static inline __attribute__((always_inline)) void NAME(message)(
    const bool encrypt, const int rounds, struct schedule data, struct schedule tweak_schedule,
    const uint8_t *tweak, size_t blocks, uint8_t *dst, const uint8_t *src)
{
    const V polynomial = BROADCAST(_mm_set_epi64x(0, 0x87));
    __m128i first = _mm_xor_si128(_mm_loadu_si128((const __m128i *)tweak), key(tweak_schedule, 0));
    EACH (int round = 1; round < rounds; round++)
        first = _mm_aesenc_si128(first, key(tweak_schedule, round));
    first = _mm_aesenclast_si128(first, key(tweak_schedule, rounds));

    V keys[15], tweaks[GROUP], state[GROUP];
    EACH (int round = 0; round <= rounds; round++)
        keys[round] = BROADCAST(key(data, round));
    FIRST(tweaks, first, polynomial);

    for (; blocks >= GROUP * LANES; blocks -= GROUP * LANES, src += 16 * GROUP * LANES, dst += 16 * GROUP * LANES) {
        EACH (int i = 0; i < GROUP; i++)
            state[i] = XOR(XOR(LOAD(src + 16 * LANES * i), tweaks[i]), keys[0]);
        EACH (int round = 1; round < rounds; round++)
            EACH (int i = 0; i < GROUP; i++)
                state[i] = encrypt ? ENC(state[i], keys[round]) : DEC(state[i], keys[round]);
        EACH (int i = 0; i < GROUP; i++) {
            state[i] = encrypt ? ENC_LAST(state[i], keys[rounds]) : DEC_LAST(state[i], keys[rounds]);
            STORE(dst + 16 * LANES * i, XOR(state[i], tweaks[i]));
        }
        if (blocks > GROUP * LANES)
            EACH (int i = 0; i < GROUP; i++)
                tweaks[i] = NAME(next)(tweaks[i], polynomial);
    }
    if (blocks > 0) {
        uint8_t kept[16 * LANES * GROUP];
        EACH (int i = 0; i < GROUP; i++)
            STORE(kept + 16 * LANES * i, tweaks[i]);
        NAME(rest)(encrypt, data, kept, blocks, dst, src);
        explicit_bzero(kept, sizeof kept);
    }
}

TARGET static __attribute__((noinline)) void NAME(xts)(
    bool encrypt, struct schedule data, struct schedule tweak_schedule,
    const uint8_t *tweak, size_t blocks, uint8_t *dst, const uint8_t *src)
{
    if (data.rounds == 14 && encrypt)
        NAME(message)(true, 14, data, tweak_schedule, tweak, blocks, dst, src);
    else if (data.rounds == 14)
        NAME(message)(false, 14, data, tweak_schedule, tweak, blocks, dst, src);
    else if (encrypt)
        NAME(message)(true, 10, data, tweak_schedule, tweak, blocks, dst, src);
    else
        NAME(message)(false, 10, data, tweak_schedule, tweak, blocks, dst, src);
}

#undef GROUP
#undef EACH
#undef TARGET
#undef V
#undef LANES
#undef NAME
#undef LOAD
#undef STORE
#undef XOR
#undef ENC
#undef ENC_LAST
#undef DEC
#undef DEC_LAST
#undef SHIFT_LEFT
#undef SHIFT_RIGHT
#undef CLMUL
#undef BROADCAST
#undef FIRST
