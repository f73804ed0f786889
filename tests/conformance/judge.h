/* Whether what a relay answered is what the server answered.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CONFORMANCE_JUDGE_H
#define VKP_TEST_CONFORMANCE_JUDGE_H

#include "conformance/differences.h"
#include "conformance/driver.h"

namespace conformance {

// A blank between words, upper case.
inline std::string joined(const Words &words)
{
    std::string text;
    for (const std::string &word : words) {
        text += (text.empty() ? "" : " ") + word;
    }
    return text;
}

// Whether a command begins with the words of a row. Its name and its subcommand have no case.
inline bool fits(const std::string &row, const Words &words)
{
    const std::string text = joined(words);
    const std::string begin = text.substr(0, row.size());
    return (begin == row || upper(begin) == row) &&
           (text.size() == row.size() || text[row.size()] == ' ');
}

inline const Masked *mask_of(const Words &words)
{
    for (const Masked &row : masks) {
        if (fits(row.command, words)) {
            return &row;
        }
    }
    return nullptr;
}

inline bool is_message(const std::string &frame)
{
    static const char *const kinds[] = {"message", "pmessage", "smessage", "invalidate"};
    const Value value = frame[0] == '>' ? parse(frame) : Value();
    return !value.elements.empty() &&
           std::any_of(std::begin(kinds), std::end(kinds),
                       [&](const char *kind) { return value.elements[0].text() == kind; });
}

// A message of RESP3 may stand between any two replies: they are compared behind the replies, in
// their order. What MONITOR shows has what others do in it.
inline Strings in_order(const Strings &frames)
{
    Strings out;
    Strings messages;
    for (const std::string &frame : frames) {
        const bool monitored = frame.size() > 20 && frame[0] == '+' &&
                               std::isdigit(frame[1]) != 0 && frame.find(" [") != std::string::npos;
        if (is_message(frame)) {
            messages.push_back(frame);
        } else if (!monitored) {
            out.push_back(frame);
        }
    }
    out.insert(out.end(), messages.begin(), messages.end());
    return out;
}

class Judge {
  public:
    explicit Judge(const Program &program) : program_(program), hits_(std::size(differences), 0)
    {
    }

    // "" or what is wrong.
    std::string judge(const Script &script, const Variant &variant, const Heard &heard,
                      bool only_relay)
    {
        const std::vector<Step> steps = steps_of(script, variant);
        const Strings direct = in_order(heard.direct);
        const Strings relayed = in_order(heard.relayed);
        const std::vector<size_t> owners = owners_of(steps, variant, relayed.size());
        aborted_ = false;
        if (!heard.neighbour.empty()) {
            return "a neighbour heard " + heard.neighbour;
        }
        if (only_relay) {
            return judge_denied(script, variant, relayed);
        }
        for (size_t i = 0; i < std::max(direct.size(), relayed.size()); i++) {
            const std::string a = i < direct.size() ? direct[i] : "";
            const std::string b = i < relayed.size() ? relayed[i] : "";
            const bool owned = i < owners.size();
            comparisons++;
            if (!is_same(steps, owned ? owners[i] : steps.size(), a, b, variant)) {
                return "reply " + std::to_string(i + 1) + " of " + std::to_string(direct.size()) +
                       (owned ? ", of " + joined(steps[owners[i]].words) : "") +
                       ": directly\n    " + excerpt(a, b) + "through the relay\n    " +
                       excerpt(b, a);
            }
            if (aborted_ && owned && owners[i] + 2 == steps.size()) {
                break; // what the server did is not what the relay refused to
            }
        }
        return "";
    }
    // Rows whose difference was not seen, though the server has the command.
    std::string unseen(const std::vector<Command> &commands) const
    {
        std::string rows;
        for (size_t i = 0; i < hits_.size(); i++) {
            const Difference &row = differences[i];
            const std::string name = row.command;
            const bool there =
                std::any_of(commands.begin(), commands.end(), [&](const Command &each) {
                    return each.name == name.substr(0, each.name.size());
                });
            if (hits_[i] == 0 && there && applies(row)) {
                rows += name + (row.where == Where::Queue ? " (in MULTI); " : "; ");
            }
        }
        return rows;
    }
    size_t named() const
    {
        size_t count = 0;
        for (const size_t hits : hits_) {
            count += hits;
        }
        return count;
    }

    size_t comparisons = 0;
    size_t late_errors = 0; // that a server gives while queueing, and the relay at EXEC

  private:
    bool applies(const Difference &row) const
    {
        return (row.from == 0 || program_.version >= row.from) &&
               (row.before == 0 || program_.version < row.before) &&
               (row.family == 0 || program_.family == row.family);
    }
    // The step of each frame; empty: it cannot be said.
    static std::vector<size_t> owners_of(const std::vector<Step> &steps, const Variant &variant,
                                         size_t frames)
    {
        std::vector<size_t> owners;
        for (size_t i = 0; i < steps.size(); i++) {
            const bool one = variant.multi || steps[i].kind == Step::Kind::Frame;
            owners.insert(owners.end(), one ? 1 : steps[i].replies(), i);
        }
        return variant.multi || owners.size() == frames ? owners : std::vector<size_t>();
    }
    static std::string normalised(const Words &words, const std::string &frame)
    {
        const Masked *row = mask_of(words);
        return row == nullptr || frame.empty() || words.empty() ? frame
                                                                : masked(parse(frame), row->mask);
    }
    // Whether the reply of one command is the same, or differs as a row says.
    bool is_answer(const Words &words, const std::string &a, const std::string &b)
    {
        return a == b || normalised(words, a) == normalised(words, b) ||
               is_named(words, Where::Reply, a, b);
    }
    // EXEC's reply: each element is the answer of its command.
    bool is_exec(const std::vector<Step> &steps, const std::string &a, const std::string &b)
    {
        if (a == b || (aborted_ && starts_with(b, "-EXECABORT"))) {
            return true;
        }
        const Value direct = parse(a);
        const Value relayed = parse(b);
        bool same = direct.head == relayed.head && direct.type() == '*' &&
                    direct.elements.size() + 3 == steps.size();
        for (size_t i = 0; same && i < direct.elements.size(); i++) {
            same = is_answer(steps[i + 1].words, direct.elements[i].bytes(),
                             relayed.elements[i].bytes());
        }
        return same;
    }
    // at: the step that the reply belongs to; steps.size() where that is not known.
    bool is_same(const std::vector<Step> &steps, size_t at, const std::string &a,
                 const std::string &b, const Variant &variant)
    {
        if (at == steps.size()) {
            return a == b || std::any_of(steps.begin(), steps.end(), [&](const Step &step) {
                       return normalised(step.words, a) == normalised(step.words, b);
                   });
        }
        const Words &words = steps[at].words;
        if (starts_with(a, "-") && b == "+QUEUED\r\n") { // QUEUED is the relay's word
            late_errors++;
            return true;
        }
        if (!variant.multi || at == 0 || at + 1 == steps.size()) {
            return is_answer(words, a, b);
        }
        if (at + 2 == steps.size()) {
            return is_exec(steps, a, b);
        }
        if (a != b && is_named(words, Where::Queue, a, b)) {
            aborted_ = true;
            return true;
        }
        return is_answer(words, a, b);
    }
    bool is_named(const Words &words, Where where, const std::string &a, const std::string &b)
    {
        for (size_t i = 0; i < hits_.size(); i++) {
            const Difference &row = differences[i];
            if (row.where == where && applies(row) && fits(row.command, words) &&
                relay_probe::contains(a, row.direct) && relay_probe::contains(b, row.relay)) {
                hits_[i]++;
                return true;
            }
        }
        return false;
    }
    // The relay denies what its server is not asked.
    std::string judge_denied(const Script &script, const Variant &variant, const Strings &relayed)
    {
        const size_t at = variant.multi ? 1 : 0;
        comparisons++;
        const Where where = variant.multi ? Where::Queue : Where::Reply;
        if (at < relayed.size() && is_named(script.steps[0].words, where, "", relayed[at])) {
            return "";
        }
        return "the relay does not deny " + script.text;
    }
    // What stands around the first difference, a line for each line.
    static std::string excerpt(const std::string &text, const std::string &other)
    {
        size_t at = 0;
        while (at < text.size() && at < other.size() && text[at] == other[at]) {
            at++;
        }
        const size_t from = at < 60 ? 0 : at - 60;
        std::string out = from > 0 ? "..." : "";
        for (const char c : text.substr(from, 160)) {
            out += c == '\r' ? "\\r" : c == '\n' ? "\\n" : std::string(1, c);
        }
        return out + "\n";
    }

    const Program &program_;
    std::vector<size_t> hits_;
    bool aborted_ = false; // a command of the transaction was refused by the relay
};

} // namespace conformance

#endif
