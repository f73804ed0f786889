#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-value   Values of RESP2 and RESP3
   Source of the facts: the RESP3 specification (redis/redis-specifications, protocol/RESP3.md). */

/* The type of a value. Each comment starts with the type bytes on the wire. */
typedef enum vkp_resp_type {
    /* _  and RESP2's $-1 (VKP_VALUE_NULL_BULK) and *-1 (VKP_VALUE_NULL_ARRAY). */
    VKP_RESP_NULL = 0,
    /* $  + (VKP_VALUE_SIMPLE)  = (VKP_VALUE_VERBATIM)  the text is str, len. */
    VKP_RESP_STRING,
    VKP_RESP_ERROR,   /* - (VKP_VALUE_SIMPLE)  !  the text is str, len */
    VKP_RESP_INTEGER, /* :  the number is integer */
    VKP_RESP_DOUBLE,  /* ,  the digits are str, len; vkp_value_get_double converts them */
    VKP_RESP_BOOL,    /* #  integer is 0 or 1 */
    VKP_RESP_BIGNUM,  /* (  the digits with their sign are str, len */
    VKP_RESP_ARRAY,   /* *  len elements */
    VKP_RESP_SET,     /* ~  len elements */
    VKP_RESP_PUSH,    /* >  len elements; the first is a string, the kind of the push */
    VKP_RESP_MAP,     /* %  len elements: key, value, key, value ... (twice the wire's count) */
    /* |  len elements: key, value, key, value ... (twice the wire's count). An attribute precedes
       the value that it annotates.                                                            */
    VKP_RESP_ATTRIBUTE
} vkp_resp_type;

#ifndef __cplusplus
/* In C an enumerator is an int, and compilers compare an int with any enum without a warning. With
   these casts a comparison of a RESP type with a status or with a bit of readiness is a warning. */
#define VKP_RESP_NULL ((vkp_resp_type)VKP_RESP_NULL)
#define VKP_RESP_STRING ((vkp_resp_type)VKP_RESP_STRING)
#define VKP_RESP_ERROR ((vkp_resp_type)VKP_RESP_ERROR)
#define VKP_RESP_INTEGER ((vkp_resp_type)VKP_RESP_INTEGER)
#define VKP_RESP_DOUBLE ((vkp_resp_type)VKP_RESP_DOUBLE)
#define VKP_RESP_BOOL ((vkp_resp_type)VKP_RESP_BOOL)
#define VKP_RESP_BIGNUM ((vkp_resp_type)VKP_RESP_BIGNUM)
#define VKP_RESP_ARRAY ((vkp_resp_type)VKP_RESP_ARRAY)
#define VKP_RESP_SET ((vkp_resp_type)VKP_RESP_SET)
#define VKP_RESP_PUSH ((vkp_resp_type)VKP_RESP_PUSH)
#define VKP_RESP_MAP ((vkp_resp_type)VKP_RESP_MAP)
#define VKP_RESP_ATTRIBUTE ((vkp_resp_type)VKP_RESP_ATTRIBUTE)
#endif

/* The bits of vkp_value.flags. */
typedef enum vkp_value_flags {
    VKP_VALUE_SIMPLE = 1,     /* the string or error was sent as one line (+ or -) */
    VKP_VALUE_VERBATIM = 2,   /* the string was sent as =; str starts after the 4 bytes "txt:" */
    VKP_VALUE_NULL_BULK = 4,  /* the null was sent as $-1 */
    VKP_VALUE_NULL_ARRAY = 8, /* the null was sent as *-1 (with lenient also as >-1) */
    /* A push inside another aggregate: a message (servers before 7.2 write it into the reply of the
       command that publishes it, at any depth) or an invalidation (before 7.0). The push is no
       element of the aggregate: vkp_value.len does not count it, vkp_value_get_first and
       vkp_value_get_next skip it. A client delivers such a push by itself: replies have none. */
    VKP_VALUE_OUT_OF_BAND = 16
} vkp_value_flags;

/* One value of a tree. A tree is one array in the order of the wire: the elements of an aggregate
   follow the aggregate, each element with its own elements behind it. Walk the tree with
   vkp_value_get_first and vkp_value_get_next, never by index.                                 */
typedef struct vkp_value {
    uint8_t type;          /* a vkp_resp_type */
    uint8_t flags;         /* VKP_VALUE_* bits */
    uint16_t i_depth;      /* private */
    uint32_t span;         /* entries of the array that this value takes, with all its elements */
    uint32_t attributes;   /* entries back to this value's VKP_RESP_ATTRIBUTE; 0: none */
    uint32_t i_has_nested; /* private: a VKP_VALUE_OUT_OF_BAND is inside */
    size_t len;            /* bytes of str; of an aggregate, the number of elements */
    union {
        const char *str; /* text of a STRING, ERROR, DOUBLE or BIGNUM; not terminated */
        int64_t integer; /* number of an INTEGER; 0 or 1 of a BOOL */
        size_t i_offset; /* private */
    } u;
} vkp_value;

/* The first element of the aggregate `parent`; NULL when there is none, or parent is no aggregate.
   Attributes and VKP_VALUE_OUT_OF_BAND pushes are skipped. Views parent. Any thread.          */
VKP_API const vkp_value *vkp_value_get_first(const vkp_value *parent);

/* The element after `value` in the aggregate `parent`; NULL after the last one, or when value is
   NULL. Attributes and VKP_VALUE_OUT_OF_BAND pushes are skipped. Views parent. Any thread.    */
VKP_API const vkp_value *vkp_value_get_next(const vkp_value *parent, const vkp_value *value);

/* The text of a STRING, ERROR, BIGNUM or DOUBLE; empty for other types and for NULL. Views value.
   Any thread.                                                                                 */
VKP_API vkp_str vkp_value_get_str(const vkp_value *value);

/* The number of a DOUBLE or INTEGER, in any locale; 0 for other types. Any thread. */
VKP_API double vkp_value_get_double(const vkp_value *value);

/* Whether the value is a STRING or ERROR that equals the text, ASCII case ignored. False for a text
   whose ptr is NULL. Any thread.                                                              */
VKP_API bool vkp_value_is_text(const vkp_value *value, vkp_str text);

/* Write the value as a text for people; as snprintf, at most size bytes with the NUL, and returns
   the bytes of the whole text without the NUL: from size on, the text was cut. A string is its
   bytes, a number its digits; others are null, true, false and (error) ERR why. Aggregates are
   [1, "a"], sets ~[1], pushes >["kind", 1], maps {"key": 1}: strings in them have quotation marks,
   and \" \\ \n \r \t \xNN for bytes that are not printable ASCII. What vkp_value_get_first and
   vkp_value_get_next skip is left out; value itself may be an attribute, |{"key": 1}. Allocates
   nothing, and takes 17 KiB of the stack at any depth. value NULL gives no text; text may be NULL
   with size 0. Any thread.                                                                    */
VKP_API size_t vkp_value_get_text(const vkp_value *value, char *text, size_t size);

/* The limits of a reader. */
typedef struct vkp_resp_config {
    uint32_t max_depth; /* most levels of nested aggregates; 0: 128; at most 65,000 */
    /* Most elements of one aggregate, as counted on the wire (pairs of a map); 0: 2,147,483,647. */
    uint32_t max_elements;
    size_t max_bulk_bytes;  /* most bytes of one bulk string; 0: 512 MiB */
    size_t max_line_bytes;  /* most bytes of one line without its CRLF; 0: 64 KiB */
    size_t max_frame_bytes; /* most bytes of one frame; 0: 1 GiB; at most 4 GiB - 1 */
    bool lenient; /* accept what old servers send: ,nan(x) ,-nan ,+inf ,5. ,.5 and >-1 as null */
    /* Read streamed types, whose length is not known at their start: strings ($?), arrays, sets and
       maps (*? ~? %?), as RESP3 has them. They become the values that their counted forms are. The
       chunks of a string are copied together; max_bulk_bytes is for the whole string, max_elements
       for the elements that come. No server is known that sends them. false: they are refused. */
    bool streamed;
    const vkp_env *env; /* memory; NULL: all defaults */
} vkp_resp_config;

#endif /* VKP_NO_IO */
