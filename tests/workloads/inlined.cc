// What C++ inlines: templates, lambdas, members, functions of unnamed namespaces.
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <unistd.h>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {
INLINE int helper(int a) { return a * 31 + getppid(); }
}

namespace deep {
struct State {
    int value;
    INLINE int get(int x) const { return helper(value + x); }
};

static INLINE int total(State const &state, int n)
{
    int sum = 0;
    for (int i = 0; i < n; i++)
        sum += state.get(i) ^ getpid();
    return sum;
}
}

template <class T> INLINE T twice(T t) { return t + t; }

int main(int argc, char **argv)
{
    std::vector<std::string> words(argv, argv + argc);
    std::sort(words.begin(), words.end(), [](auto const &a, auto const &b) {
        return helper(a.size()) < helper(b.size());
    });
    std::map<std::string, int> counts;
    for (auto &word : words)
        counts[word] += deep::total({argc}, argc);
    int sum = 0;
    for (auto &[word, count] : counts)
        sum += twice(count) + helper(word.size());
    std::printf("%d\n", sum);
    return 0;
}
