// BLAKE3 as in its specification (O'Connor, Aumasson, Neves, Wilcox-O'Hearn), of rows of one size. Included once per SIMD
// level, inside that level's namespace.
//
// Chunks of 1024 bytes are hashed side by side, one a lane, and so are parents of a level of the trees; lanes are filled from
// several rows where one has too few. As all rows have one size, lanes differ in their bytes and in the number of the chunk.

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));  // one word of each lane

constexpr int LANES = VECTOR_BYTES / 4;

#define INLINE static inline __attribute__((always_inline))

INLINE Words all(uint32_t word) { return Words{} + word; }

#if defined(__x86_64__) && VECTOR_BYTES == 64

template <int BITS>
INLINE Words rotate(Words x) {
    return (Words)_mm512_ror_epi32((__m512i)x, BITS);
}

// Sixteen bytes of each of four blocks. Insertions from memory can run where shuffles cannot, and so cost less than these.
INLINE __m512i read_quarters(const uint8_t* const* from, int64_t at) {
    const auto quarter = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i] + at)); };
    const __m512i one = _mm512_castsi128_si512(quarter(0)), two = _mm512_inserti32x4(one, quarter(4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, quarter(8), 2), quarter(12), 3);
}

// words[i] = word i of each of 16 blocks.
INLINE void read_blocks(Words* words, const uint8_t* const* from, int64_t at) {
#pragma GCC unroll 4
    for (int i = 0; i < WORDS; i += 4, at += 16) {
        __m512i a[4], b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) a[j] = read_quarters(from + j, at);
        b[0] = _mm512_unpacklo_epi32(a[0], a[1]), b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
        b[2] = _mm512_unpacklo_epi32(a[2], a[3]), b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
        words[i] = (Words)_mm512_unpacklo_epi64(b[0], b[2]), words[i + 1] = (Words)_mm512_unpackhi_epi64(b[0], b[2]);
        words[i + 2] = (Words)_mm512_unpacklo_epi64(b[1], b[3]), words[i + 3] = (Words)_mm512_unpackhi_epi64(b[1], b[3]);
    }
}

#elif defined(__x86_64__) && VECTOR_BYTES == 32

template <int BITS>
INLINE Words rotate(Words x) {
    if (BITS == 8 || BITS == 16) {
        const __m128i by_one = _mm_setr_epi8(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12);
        const __m128i by_two = _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        return (Words)_mm256_shuffle_epi8((__m256i)x, _mm256_broadcastsi128_si256(BITS == 8 ? by_one : by_two));
    }
    return x >> BITS | x << (32 - BITS);
}

// words[i] = word i of each of 8 blocks.
INLINE void read_blocks(Words* words, const uint8_t* const* from, int64_t at) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, words += 8, at += 32) {
        __m256i a[8], b[8];
        for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[i] + at));
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            words[j] = (Words)_mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
            words[4 + j] = (Words)_mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
        }
    }
}

#else

template <int BITS>
INLINE Words rotate(Words x) {
    return x >> BITS | x << (32 - BITS);
}

INLINE uint32_t word_at(const uint8_t* from) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return little(word);
}

// words[i] = word i of each of 4 blocks.
INLINE void read_blocks(Words* words, const uint8_t* const* from, int64_t at) {
    for (int i = 0; i < WORDS; ++i, at += 4) {
        words[i] = Words{word_at(from[0] + at), word_at(from[1] + at), word_at(from[2] + at), word_at(from[3] + at)};
    }
}

#endif

// Four columns or diagonals at once, step by step, as their steps do not wait for one another; `at` numbers their words.
template <int B, int C, int D>
INLINE void mix(Words* v, const Words* words, const int* at) {
#define EACH_OF_FOUR(step)                                                       \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) {                          \
        Words &a = v[i], &b = v[4 + (i + B) % 4], &c = v[8 + (i + C) % 4], &d = v[12 + (i + D) % 4]; \
        step;                                                                      \
    }
    EACH_OF_FOUR(a = a + words[at[2 * i]] + b)
    EACH_OF_FOUR(d = rotate<16>(d ^ a))
    EACH_OF_FOUR(c += d)
    EACH_OF_FOUR(b = rotate<12>(b ^ c))
    EACH_OF_FOUR(a = a + words[at[2 * i + 1]] + b)
    EACH_OF_FOUR(d = rotate<8>(d ^ a))
    EACH_OF_FOUR(c += d)
    EACH_OF_FOUR(b = rotate<7>(b ^ c))
#undef EACH_OF_FOUR
}

template <int ROUND>
INLINE void mix_round(Words* v, const Words* words) {
    constexpr const int* at = SCHEDULE.word[ROUND];
    mix<0, 0, 0>(v, words, at);
    mix<1, 2, 3>(v, words, at + 8);
}

// Chaining values after one more block of `bytes` bytes.
INLINE void compress(Words* values, const Words* words, const Words* counter, uint32_t bytes, uint32_t flags) {
    Words v[16] = {values[0], values[1], values[2],  values[3],  values[4],     values[5],     values[6], values[7],
                   all(START[0]), all(START[1]), all(START[2]), all(START[3]), counter[0], counter[1], all(bytes), all(flags)};
    mix_round<0>(v, words);
    mix_round<1>(v, words);
    mix_round<2>(v, words);
    mix_round<3>(v, words);
    mix_round<4>(v, words);
    mix_round<5>(v, words);
    mix_round<6>(v, words);
    for (int i = 0; i < VALUES; ++i) values[i] = v[i] ^ v[8 + i];
}

// What is hashed side by side: chunks or parents of one size.
struct Lanes {
    int64_t bytes;                // of each
    uint32_t flags, first, last;  // of every block, and also of the first and of the last one
    int filled = 0;
    const uint8_t* from[LANES];   // whole blocks, the last padded with zeros
    uint32_t* to[LANES];          // [VALUES]
    uint64_t number[LANES];       // of a chunk, 0 for a parent

    Lanes(int64_t bytes, uint32_t flags, uint32_t first, uint32_t last)
        : bytes(bytes), flags(flags), first(first), last(last) {}

    void add(const uint8_t* source, uint32_t* target, uint64_t chunk) {
        from[filled] = source, to[filled] = target, number[filled] = chunk;
        if (++filled == LANES) hash();
    }

    void finish() {
        if (!filled) return;
        std::fill(from + filled, from + LANES, from[0]);
        std::fill(number + filled, number + LANES, 0);
        hash();
    }

  private:
    // What these lanes will hold next, mostly: without it, rows that are in no cache took 1.5 times as long.
    void prefetch(int64_t at) const {
        for (const uint8_t* block : from) {
            __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(block) + LANES * CHUNK + at));
        }
    }

    __attribute__((noinline)) void hash() {
        Words values[VALUES], words[WORDS], counter[2];
        for (int i = 0; i < VALUES; ++i) values[i] = all(START[i]);
        for (int lane = 0; lane < LANES; ++lane) {
            counter[0][lane] = (uint32_t)number[lane];
            counter[1][lane] = (uint32_t)(number[lane] >> 32);
        }
        for (int64_t at = 0; at == 0 || at < bytes; at += BLOCK) {
            const uint32_t also = (at ? 0 : first) | (at + BLOCK < bytes ? 0 : last);
            if (bytes == CHUNK) prefetch(at);
            read_blocks(words, from, at);
            compress(values, words, counter, std::min(BLOCK, bytes - at), flags | also);
        }
        for (int lane = 0; lane < filled; ++lane) {
            for (int i = 0; i < VALUES; ++i) to[lane][i] = little(values[i][lane]);
        }
        filled = 0;
    }
};

// Chaining values of every chunk of some rows, [rows, chunks, VALUES].
static void hash_chunks(const DigestJob& job, int64_t row, int64_t rows, int64_t bytes, int64_t chunks, uint32_t* values) {
    uint8_t copies[LANES][CHUNK];
    const uint32_t last = CHUNK_END | (chunks == 1) * ROOT;
    const int64_t whole = bytes / CHUNK;
    Lanes full(CHUNK, 0, CHUNK_START, last), rest(bytes % CHUNK, 0, CHUNK_START, last);
    for (int64_t i = 0; i < rows; ++i) {
        Cursor cursor(job, row + i, 0);
        for (int64_t chunk = 0; chunk < whole; ++chunk) {
            full.add(cursor.next(CHUNK, copies[full.filled]), values + (i * chunks + chunk) * VALUES, chunk);
        }
    }
    full.finish();
    for (int64_t i = 0; i < rows && whole < chunks; ++i) {
        Cursor cursor(job, row + i, whole * CHUNK);
        rest.add(cursor.next(rest.bytes, copies[rest.filled]), values + (i * chunks + whole) * VALUES, whole);
    }
    rest.finish();
}

// Chaining values of parents, [rows, (count + 1) / 2, VALUES], from those of their children, [rows, count, VALUES]. A child
// without a sibling stays as it is.
static void hash_parents(int64_t rows, int64_t count, const uint32_t* children, uint32_t* parents) {
    Lanes pairs(BLOCK, PARENT | (count == 2) * ROOT, 0, 0);
    for (int64_t i = 0; i < rows; ++i, children += count * VALUES) {
        for (int64_t child = 0; child + 1 < count; child += 2, parents += VALUES) {
            pairs.add(reinterpret_cast<const uint8_t*>(children + child * VALUES), parents, 0);
        }
        if (count % 2) {
            memcpy(parents, children + (count - 1) * VALUES, VALUES * sizeof *parents);
            parents += VALUES;
        }
    }
    pairs.finish();
}

static int digest_rows(const DigestJob& job) {
    const int64_t bytes = row_bytes(job), chunks = std::max<int64_t>(1, (bytes + CHUNK - 1) / CHUNK);
    const int64_t size = VALUES * sizeof(uint32_t);
    int64_t together = std::max<int64_t>(1, ROOM / (chunks * size));
    if (together > LANES) together -= together % LANES;  // the last chunks and the roots are as many as there are rows
    together = std::min(together, job.rows);
    uint32_t* room = static_cast<uint32_t*>(malloc(std::max<int64_t>(1, together * (chunks + (chunks + 1) / 2) * size)));
    if (!room) return 1;
    for (int64_t row = 0; row < job.rows; row += together) {
        const int64_t rows = std::min(together, job.rows - row);
        uint32_t *values = room, *parents = room + together * chunks * VALUES;
        hash_chunks(job, row, rows, bytes, chunks, values);
        for (int64_t count = chunks; count > 1; count = (count + 1) / 2) {
            hash_parents(rows, count, values, parents);
            std::swap(values, parents);
        }
        for (int64_t i = 0; i < rows; ++i) memcpy(job.out + (row + i) * DIGEST, values + i * VALUES, DIGEST);
    }
    free(room);
    return 0;
}

#undef INLINE
