// The tile registers of x86's matrix unit (AMX), all of them 16 rows of 64 bytes. Included where the unit is in reach.

// Some compilers do not see that loading tiles or their shape reads memory, and would leave out what was stored there.
static inline void finish_stores(const void* read) { __asm__ volatile("" : : "r"(read) : "memory"); }

// Must live on a thread while it multiplies tiles.
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
        finish_stores(&shape);
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};
