// Which instruction set runs.
#ifndef FLASHMOE_DISPATCH_H
#define FLASHMOE_DISPATCH_H

#include "kernels.h"

namespace flashmoe {

const Kernels& kernels();

}
#endif
