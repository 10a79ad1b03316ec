// Exceptions on their way, for a debugger: see unwind_frames.c.
#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#define APART __attribute__((noinline, noclone))

static volatile int sink;

static inline void look(long steps)
{
	__asm__ volatile("int3" : : "D"(steps) : "memory");
}

struct Guard {
	std::string name;
	APART ~Guard()
	{
		sink += name.size();
		look(12); // while the exception unwinds
	}
};

static APART int thrower(int depth)
{
	Guard guard{std::string(30, 'a')};
	if (depth == 0)
		throw std::runtime_error("deep");
	return thrower(depth - 1) + 1;
}

static APART int catcher(int depth)
{
	try {
		return thrower(depth);
	} catch (const std::exception &error) {
		look(40);
		sink += error.what()[0];
	}
	return sink;
}

int main()
{
	std::vector<int> numbers{3, 1, 2, 5, 4};
	std::function<bool(int, int)> less = [](int one, int other) {
		if (one == 5)
			look(6);
		return one < other;
	};
	std::map<std::string, int> map;

	std::sort(numbers.begin(), numbers.end(), less);
	look(300);
	for (int number : numbers)
		map[std::to_string(number)] = number;
	return catcher(4) + map.size() > 0 ? 0 : 1;
}
