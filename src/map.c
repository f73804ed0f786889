#if VKP_I_IO
/* ======================================================================================
   >>impl-map   Names to objects, for sockets, hubs and clients
   ======================================================================================
   A hash table with chains, which doubles; its nodes are members of the objects of the owner.
   Names may come from hostile clients: the hash is keyed (SipHash-1-3 of Aumasson and Bernstein),
   with a random key for each map. The owner of a map has its lock.
   Threads without that lock may walk a shared map, if the memory of its nodes is never freed
   meanwhile: links are stored in one piece (their release pairs with the acquire of the walk), and
   old tables are kept. Such a walk may miss a node or stray into another chain: check a node that
   it finds, and search again under the lock when it finds none.                                */

typedef struct vkp_i_map_node {
    struct vkp_i_map_node *next; /* of the chain; atomic in a shared map */
    uint64_t hash;               /* of the key; atomic in a shared map */
    vkp_str key;                 /* borrowed from the owner of the node */
} vkp_i_map_node;

typedef struct vkp_i_buckets {
    struct vkp_i_buckets *older; /* in a shared map: the table before this one, kept */
    size_t count;                /* buckets, a power of two; they follow this struct */
} vkp_i_buckets;

typedef struct vkp_i_map {
    const vkp_env *env;
    vkp_i_buckets *buckets; /* atomic: the table; NULL before the first insert */
    size_t count;           /* nodes */
    bool shared;            /* threads without the lock of the owner walk the map */
    uint64_t key[2];        /* of the hash, random */
} vkp_i_map;

#define VKP_I_MAP_FIRST 16u /* buckets of the first table, a power of two */

#define VKP_I_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define VKP_I_SIP_ROUND(v)               \
    do {                                 \
        (v)[0] += (v)[1];                \
        (v)[1] = VKP_I_ROTL((v)[1], 13); \
        (v)[1] ^= (v)[0];                \
        (v)[0] = VKP_I_ROTL((v)[0], 32); \
        (v)[2] += (v)[3];                \
        (v)[3] = VKP_I_ROTL((v)[3], 16); \
        (v)[3] ^= (v)[2];                \
        (v)[0] += (v)[3];                \
        (v)[3] = VKP_I_ROTL((v)[3], 21); \
        (v)[3] ^= (v)[0];                \
        (v)[2] += (v)[1];                \
        (v)[1] = VKP_I_ROTL((v)[1], 17); \
        (v)[1] ^= (v)[2];                \
        (v)[2] = VKP_I_ROTL((v)[2], 32); \
    } while (0)

/* SipHash-1-3 of the text: one round for each 8 bytes, three at the end. The four initial words
   are those of SipHash: "somepseudorandomlygeneratedbytes".                                    */
static uint64_t vkp_i_map_hash(const vkp_i_map *map, vkp_str text)
{
    uint64_t v[4];
    uint64_t word;
    unsigned shift;
    size_t i;
    v[0] = map->key[0] ^ 0x736f6d6570736575u;
    v[1] = map->key[1] ^ 0x646f72616e646f6du;
    v[2] = map->key[0] ^ 0x6c7967656e657261u;
    v[3] = map->key[1] ^ 0x7465646279746573u;
    for (i = 0; i + 8 <= text.len; i += 8) {
        word = vkp_i_load64(text.ptr + i);
        v[3] ^= word;
        VKP_I_SIP_ROUND(v);
        v[0] ^= word;
    }
    word = (uint64_t)text.len << 56;
    for (shift = 0; i < text.len; i++, shift += 8) { /* at most 7 bytes: memcpy costs more */
        word |= (uint64_t)(unsigned char)text.ptr[i] << shift;
    }
    v[3] ^= word;
    VKP_I_SIP_ROUND(v);
    v[0] ^= word;
    v[2] ^= 0xff;
    VKP_I_SIP_ROUND(v);
    VKP_I_SIP_ROUND(v);
    VKP_I_SIP_ROUND(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static void vkp_i_map_init(vkp_i_map *map, const vkp_env *env)
{
    const vkp_sys *sys = vkp_i_sys(env);
    memset(map, 0, sizeof *map);
    map->env = env;
    map->key[0] = sys->random_u64();
    map->key[1] = sys->random_u64();
}

/* The head of the chain for the hash. */
static vkp_i_map_node **vkp_i_map_bucket(vkp_i_buckets *buckets, uint64_t hash)
{
    return (vkp_i_map_node **)(void *)(buckets + 1) + (hash & (buckets->count - 1));
}

static void vkp_i_buckets_free(const vkp_env *env, vkp_i_buckets *buckets)
{
    vkp_i_free(env, buckets, sizeof *buckets + buckets->count * sizeof(vkp_i_map_node *));
}

/* Free all tables; the nodes stay the property of their owners. */
static void vkp_i_map_deinit(vkp_i_map *map)
{
    while (map->buckets != NULL) {
        vkp_i_buckets *older = map->buckets->older;
        vkp_i_buckets_free(map->env, map->buckets);
        map->buckets = older;
    }
}

static vkp_i_map_node *vkp_i_map_find(const vkp_i_map *map, uint64_t hash, vkp_str key)
{
    vkp_i_map_node *node = map->buckets != NULL ? *vkp_i_map_bucket(map->buckets, hash) : NULL;
    while (node != NULL && (node->hash != hash || !vkp_i_str_equal(node->key, key))) {
        node = node->next;
    }
    return node;
}

/* Make the node the first of its chain; a walk sees it only after its own link is stored. */
static void vkp_i_map_link(vkp_i_buckets *buckets, vkp_i_map_node *node)
{
    vkp_i_map_node **bucket = vkp_i_map_bucket(buckets, node->hash);
    VKP_I_STORE_REL(&node->next, *bucket);
    VKP_I_STORE_REL(bucket, node);
}

/* Move all nodes to a new table. The old table is kept in a shared map, else freed. False
   without memory: the map is unchanged.                                                        */
static bool vkp_i_map_resize(vkp_i_map *map, size_t bucket_count)
{
    vkp_i_buckets *older = map->buckets;
    vkp_i_buckets *buckets = (vkp_i_buckets *)vkp_i_alloc_zero(
        map->env, sizeof *buckets + bucket_count * sizeof(vkp_i_map_node *));
    size_t i;
    if (buckets == NULL) {
        return false;
    }
    buckets->count = bucket_count;
    for (i = 0; older != NULL && i < older->count; i++) {
        vkp_i_map_node *node = *vkp_i_map_bucket(older, i);
        while (node != NULL) {
            vkp_i_map_node *next = node->next;
            vkp_i_map_link(buckets, node);
            node = next;
        }
    }
    if (older != NULL && map->shared) {
        buckets->older = older;
    } else if (older != NULL) {
        vkp_i_buckets_free(map->env, older);
    }
    VKP_I_STORE_REL(&map->buckets, buckets);
    return true;
}

/* Insert a node whose hash and key are set. False when there is no memory for the first table; a
   map that cannot double becomes slower, not wrong.                                            */
static bool vkp_i_map_insert(vkp_i_map *map, vkp_i_map_node *node)
{
    size_t room = map->buckets != NULL ? map->buckets->count : 0;
    if (map->count >= room && !vkp_i_map_resize(map, room == 0 ? VKP_I_MAP_FIRST : room * 2) &&
        room == 0) {
        return false;
    }
    vkp_i_map_link(map->buckets, node);
    map->count++;
    return true;
}

/* Remove a node that is in the map. */
static void vkp_i_map_remove(vkp_i_map *map, vkp_i_map_node *node)
{
    vkp_i_map_node **link = vkp_i_map_bucket(map->buckets, node->hash);
    while (*link != node) {
        link = &(*link)->next;
    }
    VKP_I_STORE_REL(link, node->next);
    map->count--;
}

/* The next node of a walk; NULL begins the walk, and ends it. Of all nodes, only the node
   returned last may be removed during the walk.                                                */
static vkp_i_map_node *vkp_i_map_get_next(const vkp_i_map *map, const vkp_i_map_node *node)
{
    size_t count = map->buckets != NULL ? map->buckets->count : 0;
    size_t bucket = 0;
    vkp_i_map_node *found = NULL;
    if (node != NULL) {
        if (node->next != NULL) {
            return node->next;
        }
        bucket = (size_t)(node->hash & (count - 1)) + 1;
    }
    for (; bucket < count && found == NULL; bucket++) {
        found = *vkp_i_map_bucket(map->buckets, bucket);
    }
    return found;
}

#endif /* VKP_I_IO */
