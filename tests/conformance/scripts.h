/* The scripts of commands.txt, and those that are made from what a server says of its commands.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CONFORMANCE_SCRIPTS_H
#define VKP_TEST_CONFORMANCE_SCRIPTS_H

#include "conformance/reply.h"
#include "support/support.h"

#include <fstream>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace conformance {

using Words = std::vector<std::string>;

inline std::string upper(std::string text)
{
    for (char &c : text) {
        c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    }
    return text;
}

// One step of a script.
struct Step {
    enum class Kind { Command, Other, Frame }; // a command; one of another client; wait for a frame
    Kind kind;
    Words words;

    // How many replies the command has.
    size_t replies() const
    {
        static const std::set<std::string> family = {"SUBSCRIBE",   "PSUBSCRIBE",   "SSUBSCRIBE",
                                                     "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"};
        return family.count(upper(words[0])) > 0 && words.size() > 2 ? words.size() - 1 : 1;
    }
};

struct Script {
    std::string text; // as it is in the file
    std::vector<Step> steps;
    bool plain = false; // not in a transaction, too
    unsigned from = 0;  // for servers from this version on: 100 * major + minor

    bool is_stepwise() const
    {
        return std::any_of(steps.begin(), steps.end(),
                           [](const Step &step) { return step.kind != Step::Kind::Command; });
    }
    // Whether one of its commands begins with one of the texts.
    bool has(std::initializer_list<const char *> beginnings) const
    {
        for (const Step &step : steps) {
            const std::string name = step.words.empty() ? "" : upper(step.words[0]);
            for (const char *beginning : beginnings) {
                if (name.compare(0, std::strlen(beginning), beginning) == 0) {
                    return true;
                }
            }
        }
        return false;
    }
};

// "SET s \"a b\"" as its words; what is between % is looked up.
class Reader {
  public:
    Reader(const std::string &text, const std::map<std::string, std::string> &values)
        : text_(text), values_(values)
    {
    }
    // False at the end. A word that was in quotes is no separator.
    bool next(std::string &word, bool &quoted)
    {
        word.clear();
        at_ = text_.find_first_not_of(' ', at_);
        quoted = at_ != std::string::npos && text_[at_] == '"';
        if (at_ == std::string::npos) {
            return false;
        }
        if (quoted) {
            for (at_++; at_ < text_.size() && text_[at_] != '"'; at_++) {
                word += text_[at_] == '\\' ? escaped() : text_[at_];
            }
            at_++;
            return true;
        }
        const size_t end = std::min(text_.find(' ', at_), text_.size());
        word = text_.substr(at_, end - at_);
        at_ = end;
        if (word.size() > 2 && word.front() == '%' && word.back() == '%') {
            word = values_.at(word.substr(1, word.size() - 2));
        }
        return true;
    }

  private:
    char escaped()
    {
        const char c = text_[++at_];
        return c == 'n' ? '\n' : c == 'r' ? '\r' : c;
    }
    const std::string &text_;
    const std::map<std::string, std::string> &values_;
    size_t at_ = 0;
};

inline Script script_of(const std::string &line, const std::map<std::string, std::string> &values)
{
    Script script;
    script.text = line;
    Reader reader(line, values);
    Step step = {Step::Kind::Command, {}};
    std::string word;
    bool quoted = false;
    const auto end_step = [&] {
        script.steps.push_back(step);
        step = {Step::Kind::Command, {}};
    };
    while (reader.next(word, quoted)) {
        if (!quoted && word == ";") {
            end_step();
        } else if (!quoted && word == "[plain]") {
            script.plain = true;
        } else if (!quoted && word.size() == 5 && word.front() == '[') {
            script.from = static_cast<unsigned>(100 * (word[1] - '0') + word[3] - '0');
        } else if (!quoted && step.words.empty() && (word == "@" || word == "+")) {
            step.kind = word == "@" ? Step::Kind::Other : Step::Kind::Frame;
        } else {
            step.words.push_back(word);
        }
    }
    end_step();
    return script;
}

inline std::vector<Script> read_scripts(const std::map<std::string, std::string> &values)
{
    const char *folder = std::getenv("VKP_TEST_SOURCE_DIR");
    const std::string path = std::string(folder ? folder : ".") + "/tests/conformance/commands.txt";
    std::ifstream file(path);
    std::vector<Script> scripts;
    for (std::string line; std::getline(file, line);) {
        if (!line.empty() && line[0] != '#') {
            scripts.push_back(script_of(line, values));
        }
    }
    if (scripts.empty()) {
        vkp_test_fail("no scripts in %s", path.c_str());
    }
    return scripts;
}

// What COMMAND says of one command or subcommand.
struct Command {
    std::string name; // upper case; of a subcommand "CONFIG GET"
    long arity;
    long first, last, step; // of the keys

    size_t name_words() const
    {
        return name.find(' ') == std::string::npos ? 1 : 2;
    }
    // The name, and as many arguments as it takes, and `more`.
    std::string with_arguments(size_t more) const
    {
        std::string text = name;
        const size_t least = static_cast<size_t>(std::labs(arity));
        for (size_t i = name_words(); i < least + more; i++) {
            const long at = static_cast<long>(i);
            const long end = last < 0 ? static_cast<long>(least) + last : last;
            const bool key =
                first > 0 && at >= first && at <= end && (at - first) % std::max(step, 1L) == 0;
            text += key ? " s" : " 1";
        }
        return text;
    }
};

inline void add_command(const Value &value, std::vector<Command> &out)
{
    const std::vector<Value> &parts = value.elements;
    const auto number = [&](size_t i) { return std::atol(parts[i].text().c_str()); };
    std::string name = upper(parts[0].text());
    std::replace(name.begin(), name.end(), '|', ' ');
    out.push_back({name, number(1), number(3), number(4), number(5)});
    if (parts.size() > 9) {
        for (const Value &sub : parts[9].elements) {
            add_command(sub, out);
        }
    }
}

inline std::vector<Command> commands_of(const std::string &reply)
{
    std::vector<Command> commands;
    for (const Value &value : parse(reply).elements) {
        add_command(value, commands);
    }
    std::sort(commands.begin(), commands.end(),
              [](const Command &a, const Command &b) { return a.name < b.name; });
    return commands;
}

// With any arguments these reach for other servers, make a replica of one, or do not end.
inline bool is_only_written_down(const Command &command)
{
    static const std::set<std::string> names = {"MIGRATE",   "MONITOR", "PSYNC",
                                                "REPLICAOF", "SLAVEOF", "SYNC"};
    return names.count(command.name) > 0;
}

// Each command without arguments, and with as few as it takes, and with one more.
inline std::vector<Script> made_scripts(const std::vector<Command> &commands)
{
    std::vector<Script> scripts;
    for (const Command &command : commands) {
        std::set<std::string> texts = {command.name};
        if (!is_only_written_down(command)) {
            texts.insert(command.with_arguments(0));
            if (command.arity < 0) {
                texts.insert(command.with_arguments(1));
            }
        }
        for (const std::string &text : texts) {
            scripts.push_back(script_of(text, {}));
        }
    }
    return scripts;
}

} // namespace conformance

#endif
