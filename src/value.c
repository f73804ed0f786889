#if VKP_I_IO
/* ======================================================================================
   >>impl-value   Values of RESP2 and RESP3
   ======================================================================================
   Read-only functions over trees that the reader made: any thread, no locks, no allocation.
   `span` of a value is the number of array places that the value and all its elements take, so
   value + value->span is its next sibling. Walks skip attributes and VKP_VALUE_OUT_OF_BAND pushes.
   The text of a double is validated when it is read (vkp_i_double_valid); later conversions rely on
   that and cannot fail. */

#define VKP_I_VERBATIM_PREFIX 4u /* bytes before the text of a verbatim string: "txt:" */

/* Whether the value counts as an element of the aggregate around it. */
static bool vkp_i_value_is_element(const vkp_value *value)
{
    return value->type != VKP_RESP_ATTRIBUTE && (value->flags & VKP_VALUE_OUT_OF_BAND) == 0;
}

/* Whether a push of this kind inside a reply is no element of it. Servers write messages and
   invalidations when they happen, also in the midst of a reply: messages before 7.2, invalidations
   before 7.0. The confirmation of a SUBSCRIBE inside a MULTI is an element: it is what the command
   answers.                                                                                    */
static bool vkp_i_is_uncounted_kind(const char *text, size_t len)
{
    static const char *const kinds[] = {"message", "pmessage", "smessage", "invalidate",
                                        "tracking-redir-broken"};
    size_t i;
    for (i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (vkp_i_str_equal(vkp_i_str(text, len), vkp_str_of(kinds[i]))) {
            return true;
        }
    }
    return false;
}

/* The first element of parent at `value` or behind it, or NULL. */
static const vkp_value *vkp_i_value_from(const vkp_value *parent, const vkp_value *value)
{
    const vkp_value *end = parent + parent->span;
    while (value < end && !vkp_i_value_is_element(value)) {
        value += value->span;
    }
    return value < end ? value : NULL;
}

VKP_API const vkp_value *vkp_value_get_first(const vkp_value *parent)
{
    return vkp_i_value_from(parent, parent + 1);
}

VKP_API const vkp_value *vkp_value_get_next(const vkp_value *parent, const vkp_value *value)
{
    return value != NULL ? vkp_i_value_from(parent, value + value->span) : NULL;
}

VKP_API vkp_str vkp_value_get_str(const vkp_value *value)
{
    bool text = value != NULL && (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR ||
                                  value->type == VKP_RESP_BIGNUM || value->type == VKP_RESP_DOUBLE);
    return text ? vkp_i_str(value->u.str, value->len) : vkp_i_str(NULL, 0);
}

VKP_API bool vkp_value_is_text(const vkp_value *value, vkp_str text)
{
    return (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR) && text.ptr != NULL &&
           vkp_i_str_alike(vkp_value_get_str(value), text);
}

/* ---- doubles ---- */

/* How many decimal digits follow at `at`. */
static size_t vkp_i_digits(const char *text, size_t len, size_t at)
{
    size_t start = at;
    while (at < len && text[at] >= '0' && text[at] <= '9') {
        at++;
    }
    return at - start;
}

#define VKP_I_EXPONENT_MAX 100000000L /* exponents saturate here; a double has -324 to 308 */
#define VKP_I_DOUBLE_DIGITS 780u /* digits that the conversion keeps; 768 decide any rounding */
#define VKP_I_DOUBLE_TEXT 840u   /* bytes: sign, kept digits, sticky digit, exponent, NUL */

/* The exponent at `at`, with its sign, saturated a little above VKP_I_EXPONENT_MAX. */
static long vkp_i_to_exponent(const char *text, size_t len, size_t at)
{
    bool negative = at < len && text[at] == '-';
    long value = 0;
    at += at < len && (text[at] == '-' || text[at] == '+') ? 1u : 0u;
    for (; at < len && value <= VKP_I_EXPONENT_MAX; at++) {
        value = value * 10 + (text[at] - '0');
    }
    return negative ? -value : value;
}

/* strtod of validated text in any locale: the copy has no decimal point, it is an integer with an
   exponent. No tie between two doubles needs more than 768 digits; one sticky digit stands for the
   digits that were cut: 1 if one of them was not zero. */
static double vkp_i_to_double(const char *text, size_t len)
{
    char copy[VKP_I_DOUBLE_TEXT];
    size_t used = 0;
    size_t kept = 0;
    size_t i = 0;
    long shift = 0;
    bool fraction = false;
    bool cut = false;
    if (text[0] == '-' || text[0] == '+') {
        copy[used++] = text[i++];
    }
    for (; i < len && text[i] != 'e' && text[i] != 'E'; i++) {
        if (text[i] == '.') {
            fraction = true;
            continue;
        }
        shift -= fraction ? 1 : 0;
        if (kept < VKP_I_DOUBLE_DIGITS) {
            copy[used] = text[i];
            used += kept > 0 || text[i] != '0' ? 1u : 0u;
            kept += kept > 0 || text[i] != '0' ? 1u : 0u;
        } else {
            shift++;
            cut = cut || text[i] != '0';
        }
    }
    if (cut || kept == 0) {
        copy[used++] = cut ? '1' : '0';
        shift -= cut ? 1 : 0;
    }
    if (i < len) {
        long exponent = vkp_i_to_exponent(text, len, i + 1);
        shift = exponent > VKP_I_EXPONENT_MAX    ? VKP_I_EXPONENT_MAX
                : exponent < -VKP_I_EXPONENT_MAX ? -VKP_I_EXPONENT_MAX
                                                 : shift + exponent;
    }
    (void)snprintf(copy + used, sizeof copy - used, "e%ld", shift);
    return strtod(copy, NULL);
}

/* DBL_MAX and not a literal: a decimal literal is slightly less where doubles are computed with
   more bits (x87). */
#define VKP_I_DOUBLE_MAX DBL_MAX

/* Whether the text is a finite double of the RESP3 grammar, or "inf", "-inf" or "nan". Lenient:
   also "nan(x)", "-nan", "+inf", "5." and ".5" of old servers. */
static bool vkp_i_double_valid(const char *text, size_t len, bool lenient)
{
    vkp_str all = vkp_i_str(text, len);
    size_t at = len > 0 && (text[0] == '-' || text[0] == '+') ? 1 : 0;
    size_t whole;
    size_t fraction = 0;
    double value;
    if (vkp_i_str_equal(all, vkp_str_of("inf")) || vkp_i_str_equal(all, vkp_str_of("-inf")) ||
        vkp_i_str_equal(all, vkp_str_of("nan"))) {
        return true;
    }
    if (lenient && vkp_i_str_equal(all, vkp_str_of("+inf"))) {
        return true;
    }
    if (lenient && len >= at + 3 && memcmp(text + at, "nan", 3) == 0) {
        return len == at + 3 || (text[at + 3] == '(' && text[len - 1] == ')');
    }
    whole = vkp_i_digits(text, len, at);
    at += whole;
    if (at < len && text[at] == '.') {
        fraction = vkp_i_digits(text, len, at + 1);
        at += 1 + fraction;
        if (lenient ? whole + fraction == 0 : whole == 0 || fraction == 0) {
            return false;
        }
    } else if (whole == 0) {
        return false;
    }
    if (at < len && (text[at] == 'e' || text[at] == 'E')) {
        size_t exponent;
        at++;
        at += at < len && (text[at] == '-' || text[at] == '+') ? 1u : 0u;
        exponent = vkp_i_digits(text, len, at);
        at += exponent;
        if (exponent == 0) {
            return false;
        }
    }
    if (at != len) {
        return false;
    }
    value = vkp_i_to_double(text, len);
    return value <= VKP_I_DOUBLE_MAX && value >= -VKP_I_DOUBLE_MAX;
}

VKP_API double vkp_value_get_double(const vkp_value *value)
{
    const char *text = value->u.str;
    double infinity = VKP_I_DOUBLE_MAX * 10.0;
    size_t at;
    if (value->type == VKP_RESP_INTEGER) {
        return (double)value->u.integer;
    }
    if (value->type != VKP_RESP_DOUBLE) {
        return 0.0;
    }
    at = text[0] == '-' || text[0] == '+' ? 1 : 0;
    if (text[at] == 'i') {
        return text[0] == '-' ? -infinity : infinity;
    }
    if (text[at] == 'n') {
        return infinity - infinity;
    }
    return vkp_i_to_double(text, value->len);
}

#endif /* VKP_I_IO */
