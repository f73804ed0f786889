/* The RESP reader and writer under any bytes. An input is a head of six bytes and a stream:
       0     bit 0: small limits; bits 1 and up: 0, or every n-th allocation fails and is retried
       1..5  the lengths, less one, of the pieces in which the stream arrives, over and over
   The stream is read whole, in pieces, and by scan over windows that move, each strictly and
   leniently, without and with streamed types: values, verdict, position and reason must be the
   same. What was read is walked, measured, written and read again. A frame with streamed types has
   the values of its counted form, and a counted frame those of its streamed form, which a model
   makes that shares nothing with the reader; limits refuse one as they refuse the other.
   SPDX-License-Identifier: MIT                                                                  */
#include "valkey_push.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAD 6u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fail(const char *what)
{
    fprintf(stderr, "fuzz_resp: %s\n", what);
    abort();
}

static void require(bool condition, const char *what)
{
    if (!condition) {
        fail(what);
    }
}

/* ---- memory: counted, and failing on demand ---- */

typedef struct memory {
    vkp_env env;
    size_t live_bytes;
    size_t peak_bytes;
    size_t asked;
    size_t fail_every;
} memory;

static void *memory_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    memory *self = (memory *)user;
    void *grown;
    if (new_bytes == 0) {
        self->live_bytes -= old_bytes;
        free(ptr);
        return NULL;
    }
    self->asked++;
    if (self->fail_every != 0 && self->asked % self->fail_every == 0) {
        return NULL;
    }
    grown = realloc(ptr, new_bytes);
    require(grown != NULL, "the machine has no memory");
    self->live_bytes = self->live_bytes - old_bytes + new_bytes;
    if (self->live_bytes > self->peak_bytes) {
        self->peak_bytes = self->live_bytes;
    }
    return grown;
}

static void memory_init(memory *self, size_t fail_every)
{
    memset(self, 0, sizeof *self);
    self->env.alloc = memory_alloc;
    self->env.user = self;
    self->fail_every = fail_every;
}

/* ---- what was seen, as bytes to compare ---- */

typedef struct trace {
    uint8_t *bytes;
    size_t len;
    size_t capacity;
} trace;

static void trace_add(trace *self, const void *bytes, size_t len)
{
    if (len > self->capacity - self->len) {
        self->capacity = (self->capacity + len) * 2;
        self->bytes = (uint8_t *)realloc(self->bytes, self->capacity);
        require(self->bytes != NULL, "the machine has no memory");
    }
    if (len > 0) {
        memcpy(self->bytes + self->len, bytes, len);
        self->len += len;
    }
}

static void trace_number(trace *self, uint64_t number)
{
    trace_add(self, &number, sizeof number);
}

static void trace_free(trace *self)
{
    free(self->bytes);
    memset(self, 0, sizeof *self);
}

static bool trace_equal(const trace *a, const trace *b)
{
    return a->len == b->len && (a->len == 0 || memcmp(a->bytes, b->bytes, a->len) == 0);
}

/* What a place says by itself: its type, how it was spelled, its text or number. */
static void trace_place(trace *self, const vkp_value *value, uint32_t flags)
{
    trace_number(self, value->type);
    trace_number(self, value->flags & flags);
    trace_number(self, value->len);
    switch ((int)value->type) {
    case VKP_RESP_STRING:
    case VKP_RESP_ERROR:
    case VKP_RESP_DOUBLE:
    case VKP_RESP_BIGNUM:
        trace_add(self, value->u.str, value->len);
        break;
    case VKP_RESP_INTEGER:
    case VKP_RESP_BOOL:
        trace_number(self, (uint64_t)value->u.integer);
        break;
    default:
        break;
    }
}

static const vkp_value *tree_begin(const vkp_value *root)
{
    while (root->attributes != 0) {
        root -= root->attributes;
    }
    return root;
}

static void trace_tree(trace *self, const vkp_value *root)
{
    const vkp_value *at;
    for (at = tree_begin(root); at < root + root->span; at++) {
        trace_place(self, at, 0xffu);
        trace_number(self, at->span);
        trace_number(self, at->attributes);
    }
}

/* What survives writing: no spelling of nulls, no uncounted pushes, no attribute of the root. */
static void trace_meaning(trace *self, const vkp_value *root)
{
    const vkp_value *at = root;
    while (at < root + root->span) {
        if ((at->flags & VKP_VALUE_OUT_OF_BAND) != 0) {
            at += at->span;
        } else {
            trace_place(self, at, VKP_VALUE_SIMPLE | VKP_VALUE_VERBATIM);
            at++;
        }
    }
}

/* ---- what holds of every tree ---- */

static void check_aggregate(const vkp_value *value)
{
    const vkp_value *child = vkp_value_get_first(value);
    const vkp_value *end = value + value->span;
    const vkp_value *at = value + 1;
    size_t children = 0;
    while (child != NULL) {
        require(child > value && child + child->span <= end, "an element outside its aggregate");
        require(child->type != VKP_RESP_ATTRIBUTE, "an attribute among the elements");
        children++;
        child = vkp_value_get_next(value, child);
    }
    require(children == value->len, "elements by the walk are not len");
    while (at < end) {
        require(at->span > 0, "a span of nothing");
        at += at->span;
    }
    require(at == end, "spans do not add up");
}

static void check_scalar(const vkp_value *value)
{
    volatile uint8_t last;
    vkp_str text = vkp_value_get_str(value);
    require(value->span == 1 && vkp_value_get_first(value) == NULL, "a scalar with elements");
    if (text.len > 0) {
        last = (uint8_t)text.ptr[text.len - 1]; /* within its block, or a sanitizer tells */
        (void)last;
    }
    require(value->type != VKP_RESP_BOOL || value->u.integer == 0 || value->u.integer == 1,
            "a boolean that is neither");
    if (value->type == VKP_RESP_DOUBLE) {
        double number = vkp_value_get_double(value);
        bool finite = number - number == 0.0;
        bool named = memchr(text.ptr, 'n', text.len) != NULL; /* inf and nan */
        require(finite != named, "a finite double read as none, or the reverse");
    }
}

static void check_tree(const vkp_value *root)
{
    const vkp_value *at;
    bool message = vkp_value_is_text(root, vkp_str_of("MESSAGE"));
    require(message == (vkp_value_is_text(root, vkp_str_of("message")) && root->len == 7),
            "text comparison");
    for (at = tree_begin(root); at < root + root->span; at++) {
        require(at->type <= VKP_RESP_ATTRIBUTE, "an unknown type");
        if (at->attributes != 0) {
            require((at - at->attributes)->type == VKP_RESP_ATTRIBUTE,
                    "attributes points elsewhere");
        }
        if (at->type >= VKP_RESP_ARRAY) {
            check_aggregate(at);
        } else {
            check_scalar(at);
        }
        if (at->type == VKP_RESP_PUSH) {
            const vkp_value *kind = vkp_value_get_first(at);
            require(kind != NULL && kind->type == VKP_RESP_STRING, "a push without a kind");
        }
    }
}

/* ---- writing what was read ---- */

static vkp_bytes written(const vkp_value *value, int protocol)
{
    vkp_resp_writer writer;
    vkp_bytes bytes = vkp_bytes_static(NULL, 0);
    vkp_resp_writer_init(&writer, NULL);
    vkp_resp_put_value(&writer, value, protocol);
    require(vkp_resp_writer_take(&writer, &bytes) == VKP_OK, "a value cannot be written");
    return bytes;
}

/* Reads bytes that must be exactly one value, in a block of exactly their size. */
static vkp_resp_reader *read_again(const vkp_bytes *bytes, bool lenient, uint8_t **block,
                                   const vkp_value **value)
{
    vkp_resp_config config = VKP_ZERO;
    vkp_resp_reader *reader = NULL;
    size_t consumed = 0;
    config.lenient = lenient;
    *block = (uint8_t *)malloc(bytes->len);
    require(*block != NULL, "the machine has no memory");
    memcpy(*block, bytes->data, bytes->len);
    require(vkp_resp_reader_open(&config, &reader) == VKP_OK, "a reader was refused");
    require(vkp_resp_reader_scan(reader, *block, bytes->len, value, &consumed) == VKP_OK,
            "what was written is no value");
    require(consumed == bytes->len, "what was written is more than one value");
    return reader;
}

static void check_written(const vkp_value *value, bool lenient)
{
    int protocol;
    trace before = {NULL, 0, 0};
    trace_meaning(&before, value);
    for (protocol = 2; protocol <= 3; protocol++) {
        vkp_bytes first = written(value, protocol);
        uint8_t *block;
        const vkp_value *again;
        vkp_resp_reader *reader = read_again(&first, lenient, &block, &again);
        vkp_bytes second = written(again, protocol);
        trace after = {NULL, 0, 0};
        require(first.len == second.len && memcmp(first.data, second.data, first.len) == 0,
                "written twice, written differently");
        trace_meaning(&after, again);
        require(protocol == 2 || trace_equal(&before, &after), "written, read, and not the same");
        trace_free(&after);
        vkp_resp_reader_unref(reader);
        free(block);
        vkp_bytes_unref(&first);
        vkp_bytes_unref(&second);
    }
    trace_free(&before);
}

/* ---- the ways of reading ---- */

static size_t piece_len(const uint8_t *head, size_t index)
{
    return (size_t)head[1 + index % (HEAD - 1)] + 1;
}

static void finish(trace *self, const vkp_resp_reader *reader, vkp_status status)
{
    uint64_t position = 0;
    const char *reason = vkp_resp_reader_get_error(reader, &position);
    require((status == VKP_ERR_EMPTY) == (reason[0] == '\0'), "an error without a reason");
    trace_number(self, (uint64_t)(int64_t)status);
    trace_number(self, position);
    trace_add(self, reason, strlen(reason));
}

static vkp_resp_reader *open_reader(vkp_resp_config *config, memory *mem)
{
    vkp_resp_reader *reader = NULL;
    vkp_status status;
    config->env = &mem->env;
    do {
        status = vkp_resp_reader_open(config, &reader);
    } while (status == VKP_ERR_NOMEM);
    require(status == VKP_OK, "a reader was refused");
    return reader;
}

static void close_reader(vkp_resp_reader *reader, const memory *mem, size_t size)
{
    vkp_resp_reader_unref(reader);
    require(mem->live_bytes == 0, "memory leaked");
    require(mem->peak_bytes <= 16384 + 64 * size, "memory out of proportion to the input");
}

/* ---- streamed types: a model that writes one form as the other ---- */

/* A whole, right frame, and what it becomes. */
typedef struct model {
    const uint8_t *data;
    size_t at;
    trace out;
    bool to_streamed;       /* otherwise to counted */
    bool dropped;           /* pushes were left out */
    const uint8_t *choices; /* to_streamed: which types, and the lengths of chunks */
    size_t chosen;
} model;

static unsigned model_choose(model *self)
{
    return (unsigned)self->choices[1 + self->chosen++ % (HEAD - 1)] + (unsigned)self->chosen;
}

/* Takes a line without its CRLF; returns its length. */
static size_t model_line(model *self)
{
    size_t start = self->at;
    while (self->data[self->at] != '\n') {
        self->at++;
    }
    return self->at++ - 1 - start;
}

static void model_header(trace *out, char mark, size_t count)
{
    char line[32];
    trace_add(out, line, (size_t)snprintf(line, sizeof line, "%c%zu\r\n", mark, count));
}

static void model_string(model *self, size_t size)
{
    const uint8_t *text = self->data + self->at;
    self->at += size + 2;
    if (!self->to_streamed || model_choose(self) % 2 == 0) {
        model_header(&self->out, '$', size);
        trace_add(&self->out, text, size);
        trace_add(&self->out, "\r\n", 2);
        return;
    }
    trace_add(&self->out, "$?\r\n", 4);
    while (size > 0) {
        size_t chunk = 1 + model_choose(self) % 7;
        chunk = chunk < size ? chunk : size;
        model_header(&self->out, ';', chunk);
        trace_add(&self->out, text, chunk);
        trace_add(&self->out, "\r\n", 2);
        text += chunk;
        size -= chunk;
    }
    trace_add(&self->out, ";0\r\n", 4);
}

static void model_chunks(model *self)
{
    trace text = {NULL, 0, 0};
    for (;;) {
        size_t size = strtoul((const char *)self->data + self->at + 1, NULL, 10);
        (void)model_line(self);
        if (size == 0) {
            break;
        }
        trace_add(&text, self->data + self->at, size);
        self->at += size + 2;
    }
    model_header(&self->out, '$', text.len);
    trace_add(&self->out, text.bytes, text.len);
    trace_add(&self->out, "\r\n", 2);
    trace_free(&text);
}

static void model_value(model *self);

/* An attribute and the value behind it are two values here, and one element. */
static void model_element(model *self)
{
    while (self->data[self->at] == '|') {
        model_value(self);
    }
    model_value(self);
}

/* Whether the push at `at` is no element of what is around it. */
static bool model_is_uncounted(const model *push)
{
    static const char *const kinds[] = {"message", "pmessage", "smessage", "invalidate",
                                        "tracking-redir-broken"};
    model kind = *push;
    const char *text;
    size_t size;
    bool uncounted = false;
    size_t i;
    memset(&kind.out, 0, sizeof kind.out);
    kind.to_streamed = false;
    (void)model_line(&kind);
    model_value(&kind);
    text = (const char *)memchr(kind.out.bytes, '\n', kind.out.len) + 1;
    size = (size_t)((const char *)kind.out.bytes + kind.out.len - 2 - text);
    if (kind.out.bytes[0] == '+') {
        text = (const char *)kind.out.bytes + 1;
        size = kind.out.len - 3;
    } else if (kind.out.bytes[0] == '=') {
        text += 4;
        size -= 4;
    }
    for (i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        uncounted = uncounted || (strlen(kinds[i]) == size && memcmp(kinds[i], text, size) == 0);
    }
    trace_free(&kind.out);
    return uncounted;
}

/* The elements of an aggregate: `count`, or those up to the end. Returns how many. Pushes between
   the last element and the end have no place in the counted form, which is over by then. */
static size_t model_elements(model *self, size_t count, bool endless)
{
    size_t done = 0;
    size_t kept = self->out.len;
    while (endless ? self->data[self->at] != '.' : done < count) {
        bool push = self->data[self->at] == '>' && self->data[self->at + 1] != '-';
        bool counts = !push || !model_is_uncounted(self);
        model_element(self);
        done += counts ? 1 : 0;
        kept = counts ? self->out.len : kept;
    }
    if (endless && !self->to_streamed && kept < self->out.len) {
        self->out.len = kept;
        self->dropped = true;
    }
    if (endless) {
        (void)model_line(self);
    }
    return done;
}

static void model_aggregate(model *self, char mark, size_t count, bool endless)
{
    size_t factor = mark == '%' || mark == '|' ? 2 : 1;
    bool may = mark == '*' || mark == '~' || mark == '%';
    trace before = self->out;
    if (self->to_streamed && may && model_choose(self) % 2 == 0) {
        char line[4] = {mark, '?', '\r', '\n'};
        trace_add(&self->out, line, 4);
        (void)model_elements(self, count * factor, endless);
        trace_add(&self->out, ".\r\n", 3);
        return;
    }
    memset(&self->out, 0, sizeof self->out);
    count = model_elements(self, count * factor, endless) / factor;
    model_header(&before, mark, count);
    trace_add(&before, self->out.bytes, self->out.len);
    trace_free(&self->out);
    self->out = before;
}

static void model_value(model *self)
{
    const uint8_t *header = self->data + self->at;
    size_t start = self->at;
    size_t size = model_line(self);
    size_t count = strtoul((const char *)header + 1, NULL, 10);
    bool endless = header[1] == '?';
    if (header[1] == '-' || strchr("$*~%|>!=", header[0]) == NULL) {
        trace_add(&self->out, header, size + 2);
    } else if (header[0] == '$' && endless) {
        model_chunks(self);
    } else if (header[0] == '$') {
        model_string(self, count);
    } else if (header[0] == '!' || header[0] == '=') {
        self->at += count + 2;
        trace_add(&self->out, header, self->at - start);
    } else {
        model_aggregate(self, (char)header[0], count, endless);
    }
}

/* The other form of a whole frame. */
static trace model_of(const uint8_t *frame, const uint8_t *choices, bool *dropped)
{
    model self;
    memset(&self, 0, sizeof self);
    self.data = frame;
    self.to_streamed = choices != NULL;
    self.choices = choices;
    model_element(&self);
    *dropped = self.dropped;
    return self.out;
}

/* What a reader of the config makes of a whole frame: OK and its values, or its verdict. */
static vkp_status read_whole(vkp_resp_config config, const trace *frame, trace *seen)
{
    vkp_resp_reader *reader = NULL;
    const vkp_value *value;
    size_t consumed = 0;
    vkp_status status;
    config.env = NULL;
    require(vkp_resp_reader_open(&config, &reader) == VKP_OK, "a reader was refused");
    status = vkp_resp_reader_scan(reader, frame->bytes, frame->len, &value, &consumed);
    if (status == VKP_OK) {
        require(consumed == frame->len, "the other form is more than one value");
        trace_tree(seen, value);
    }
    vkp_resp_reader_unref(reader);
    return status;
}

/* A frame that a reader of streamed types returned, against its other forms. */
static void check_forms(const uint8_t *frame, size_t len, bool lenient, const uint8_t *head)
{
    vkp_resp_config wide = VKP_ZERO;
    vkp_resp_config narrow = VKP_ZERO;
    trace same = {NULL, 0, 0};
    bool dropped = false; /* the counted form lacks a push, which the values have */
    bool none = false;
    trace counted = model_of(frame, NULL, &dropped);
    trace streamed = model_of(counted.bytes, head, &none);
    trace seen[3] = {{NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}};
    vkp_status verdicts[3];
    int i;
    trace_add(&same, frame, len);
    wide.lenient = lenient;
    wide.max_depth = 65000;
    require(read_whole(wide, &counted, &seen[1]) == VKP_OK, "the counted form is refused");
    wide.streamed = true;
    require(read_whole(wide, &same, &seen[0]) == VKP_OK, "a frame is refused when it comes again");
    require(read_whole(wide, &streamed, &seen[2]) == VKP_OK, "the streamed form is refused");
    require(dropped || trace_equal(&seen[0], &seen[1]),
            "streamed types, and not the values of counted ones");
    require(trace_equal(&seen[1], &seen[2]), "counted types, and not the values of streamed ones");
    require(vkp_resp_get_frame_len(streamed.bytes, streamed.len) == streamed.len || lenient,
            "frame_len of the streamed form");
    narrow = wide;
    narrow.max_depth = 3;
    narrow.max_elements = 4;
    narrow.max_bulk_bytes = 12;
    for (i = 0; i < 3; i++) {
        trace ignored = {NULL, 0, 0};
        verdicts[i] = read_whole(narrow, i == 0 ? &same : i == 1 ? &counted : &streamed, &ignored);
        trace_free(&ignored);
        trace_free(&seen[i]);
    }
    require((dropped || verdicts[0] == verdicts[1]) && verdicts[1] == verdicts[2],
            "limits differ by the form");
    trace_free(&same);
    trace_free(&counted);
    trace_free(&streamed);
}

/* By feed: whole when head is NULL, else in its pieces. */
static trace read_fed(vkp_resp_config config, const uint8_t *head, const uint8_t *stream,
                      size_t size, size_t fail_every)
{
    trace seen = {NULL, 0, 0};
    memory mem;
    vkp_resp_reader *reader;
    vkp_status status = VKP_ERR_EMPTY;
    size_t at = 0;
    size_t index = 0;
    memory_init(&mem, fail_every);
    reader = open_reader(&config, &mem);
    while (at < size && status == VKP_ERR_EMPTY) {
        size_t len = head != NULL ? piece_len(head, index++) : size;
        len = len < size - at ? len : size - at;
        do {
            status = vkp_resp_reader_feed(reader, stream + at, len);
        } while (status == VKP_ERR_NOMEM);
        require(status == VKP_OK, "feed refused what came before an error");
        at += len;
        do {
            const vkp_value *value;
            status = vkp_resp_reader_next(reader, &value);
            if (status == VKP_OK) {
                trace_tree(&seen, value);
                check_tree(value);
                if (head == NULL) {
                    check_written(value, config.lenient);
                }
            }
        } while (status == VKP_OK || status == VKP_ERR_NOMEM);
    }
    finish(&seen, reader, status);
    close_reader(reader, &mem, size);
    return seen;
}

static void check_length(const uint8_t *window, size_t len, size_t consumed)
{
    require(vkp_resp_get_frame_len(window, len) == consumed, "frame_len differs from scan");
    require(vkp_resp_get_frame_len(window, consumed) == consumed, "frame_len needs what follows");
    require(vkp_resp_get_frame_len(window, consumed - 1) == 0, "frame_len of less than a frame");
}

/* By scan: each window is a block of its own and of exactly its size, freed before the next. */
static trace read_scanned(vkp_resp_config config, const uint8_t *head, const uint8_t *stream,
                          size_t size, size_t fail_every)
{
    trace seen = {NULL, 0, 0};
    memory mem;
    vkp_resp_reader *reader;
    vkp_status status = VKP_ERR_EMPTY;
    size_t begin = 0;
    size_t end = 0;
    size_t index = 0;
    memory_init(&mem, fail_every);
    reader = open_reader(&config, &mem);
    while (end < size || status == VKP_OK) {
        size_t len = piece_len(head, index++);
        size_t consumed = 0;
        const vkp_value *value;
        uint8_t *window;
        if (status != VKP_OK) {
            end = len < size - end ? end + len : size;
        }
        window = (uint8_t *)malloc(end - begin > 0 ? end - begin : 1);
        require(window != NULL, "the machine has no memory");
        memcpy(window, stream + begin, end - begin);
        do {
            status = vkp_resp_reader_scan(reader, window, end - begin, &value, &consumed);
        } while (status == VKP_ERR_NOMEM);
        if (status == VKP_OK) {
            require(consumed > 0 && consumed <= end - begin, "more consumed than there was");
            trace_tree(&seen, value);
            if (!config.lenient) {
                check_length(window, end - begin, consumed);
            }
            if (config.streamed) {
                check_forms(window, consumed, config.lenient, head);
            }
            begin += consumed;
        }
        free(window);
        if (status != VKP_OK && status != VKP_ERR_EMPTY) {
            break;
        }
    }
    finish(&seen, reader, status);
    close_reader(reader, &mem, size);
    return seen;
}

static void compare(trace whole, trace other, const char *what)
{
    require(trace_equal(&whole, &other), what);
    trace_free(&other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vkp_resp_config config = VKP_ZERO;
    uint8_t *stream;
    size_t fail_every;
    int mode;
    if (size < HEAD) {
        return 0;
    }
    if ((data[0] & 1u) != 0) {
        config.max_depth = 3;
        config.max_elements = 4;
        config.max_bulk_bytes = 12;
        config.max_line_bytes = 10;
        config.max_frame_bytes = 60;
    }
    fail_every = data[0] >> 1;
    fail_every = fail_every == 1 ? 2 : fail_every; /* every one would be retried for ever */
    size -= HEAD;
    stream = (uint8_t *)malloc(size > 0 ? size : 1);
    require(stream != NULL, "the machine has no memory");
    memcpy(stream, data + HEAD, size);
    require(vkp_resp_get_frame_len(stream, size) <= size, "a frame longer than its bytes");
    for (mode = 0; mode < 4; mode++) {
        trace whole;
        config.lenient = (mode & 1) != 0;
        config.streamed = (mode & 2) != 0;
        whole = read_fed(config, NULL, stream, size, 0);
        compare(whole, read_fed(config, data, stream, size, fail_every), "fed in pieces");
        compare(whole, read_scanned(config, data, stream, size, fail_every), "scanned in windows");
        trace_free(&whole);
    }
    free(stream);
    return 0;
}
