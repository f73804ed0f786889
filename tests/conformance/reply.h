/* A reply taken apart, and the parts of it that two servers need not have in common.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CONFORMANCE_REPLY_H
#define VKP_TEST_CONFORMANCE_REPLY_H

#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace conformance {

// A value of a reply: its first line, then the bytes of a bulk, or the elements.
struct Value {
    std::string head; // with its CRLF
    std::string body; // of $ = !, with its CRLF
    std::vector<Value> elements;

    char type() const
    {
        return head.empty() ? '\0' : head[0];
    }
    bool is_bulk() const
    {
        return std::strchr("$=!", type()) != nullptr;
    }
    bool is_aggregate() const
    {
        return std::strchr("*%~>|", type()) != nullptr;
    }
    // The text of a bulk or of a line.
    std::string text() const
    {
        return is_bulk() ? body.substr(0, body.size() - 2) : head.substr(1, head.size() - 3);
    }
    std::string bytes() const
    {
        std::string all = head + body;
        for (const Value &element : elements) {
            all += element.bytes();
        }
        return all;
    }
};

inline Value parse_value(const std::string &frame, size_t &at)
{
    Value value;
    const size_t end = std::min(frame.find("\r\n", at) + 2, frame.size());
    value.head = frame.substr(at, end - at);
    at = end;
    const long count = std::atol(value.head.c_str() + 1);
    if (value.is_bulk() && count >= 0) {
        value.body = frame.substr(at, static_cast<size_t>(count) + 2);
        at += value.body.size();
    }
    if (value.is_aggregate()) {
        const long pairs = value.type() == '%' || value.type() == '|' ? 2 : 1;
        for (long i = 0; i < count * pairs && at < frame.size(); i++) {
            value.elements.push_back(parse_value(frame, at));
        }
    }
    return value;
}

inline Value parse(const std::string &frame)
{
    size_t at = 0;
    return parse_value(frame, at);
}

// What two servers need not have in common.
enum class Mask {
    Numbers,  // runs of digits, in texts and as values
    Random,   // letters and digits; how many there are counts
    Order,    // of the elements
    Orders,   // of the elements, and of theirs
    Names,    // of "name=value name=value", or of lines "name:value": the values, and the order
    Greeting, // the number of the client in HELLO's answer
    Kind      // all but the type
};

inline std::string without_numbers(const std::string &text)
{
    std::string out;
    for (size_t i = 0; i < text.size(); i++) {
        const bool digit = std::isdigit(static_cast<unsigned char>(text[i])) != 0;
        if (!digit) {
            out += text[i];
        } else if (i == 0 || !std::isdigit(static_cast<unsigned char>(text[i - 1]))) {
            out += '0';
        }
    }
    return out;
}

// The names that counters of single commands and errors have depend on what was asked before, and
// not by this client alone.
inline std::string names_only(const std::string &text)
{
    std::set<std::string> names;
    std::string word;
    for (const char c : text + "\n") {
        if (c != '\n' && c != '\r' && c != ' ') {
            word += c;
            continue;
        }
        const std::string name = word.substr(0, word.find_first_of("=:"));
        const bool counter = name.compare(0, 8, "cmdstat_") == 0 ||
                             name.compare(0, 10, "errorstat_") == 0 ||
                             name.compare(0, 20, "latency_percentiles_") == 0;
        if (!counter && name != word) {
            names.insert(name);
        }
        word.clear();
    }
    std::string out;
    for (const std::string &name : names) {
        out += name + " ";
    }
    return out;
}

inline void put_in_order(Value &value, bool deep)
{
    for (Value &element : value.elements) {
        if (deep) {
            put_in_order(element, deep);
        }
    }
    const size_t step = value.type() == '%' ? 2 : 1;
    std::vector<std::string> units;
    for (size_t i = 0; i + step <= value.elements.size(); i += step) {
        units.push_back(value.elements[i].bytes() +
                        (step == 2 ? value.elements[i + 1].bytes() : std::string()));
    }
    std::sort(units.begin(), units.end());
    value.elements.clear();
    for (const std::string &unit : units) {
        value.elements.push_back({unit, "", {}});
    }
}

inline void mask_greeting(Value &value)
{
    for (size_t i = 0; i + 1 < value.elements.size(); i += 2) {
        if (value.elements[i].text() == "id") {
            value.elements[i + 1] = {":0\r\n", "", {}};
        }
    }
}

inline void mask_text(Value &value, Mask mask)
{
    for (Value &element : value.elements) {
        mask_text(element, mask);
    }
    if (value.is_aggregate()) {
        return;
    }
    if (mask == Mask::Random) {
        for (char &c : value.body) {
            c = std::isalnum(static_cast<unsigned char>(c)) ? 'x' : c;
        }
    } else if (mask == Mask::Names && value.is_bulk()) {
        value.head = value.head.substr(0, 1);
        value.body = names_only(value.body);
    } else if (mask == Mask::Numbers) {
        value.head = without_numbers(value.head);
        value.body = without_numbers(value.body);
    }
}

// The bytes that two servers must have in common. An error is compared as it is.
inline std::string masked(Value value, Mask mask)
{
    if (value.type() == '-') {
        return value.bytes();
    }
    switch (mask) {
    case Mask::Order:
    case Mask::Orders:
        put_in_order(value, mask == Mask::Orders);
        break;
    case Mask::Greeting:
        mask_greeting(value);
        break;
    case Mask::Kind:
        return value.head.substr(0, 1);
    case Mask::Random:
    case Mask::Names:
    case Mask::Numbers:
        mask_text(value, mask);
        break;
    }
    return value.bytes();
}

} // namespace conformance

#endif
