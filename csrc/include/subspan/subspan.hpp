// Everything.
#pragma once

#include "subspan/blas.hpp"
#include "subspan/eigh.hpp"
#include "subspan/errors.hpp"
#include "subspan/factor.hpp"
#include "subspan/frequent_directions.hpp"
#include "subspan/isa.hpp"
#include "subspan/moments.hpp"
#include "subspan/panel.hpp"
#include "subspan/parallel.hpp"
#include "subspan/rng.hpp"
#include "subspan/streaming_svd.hpp"
#include "subspan/truncated_svd.hpp"
#include "subspan/views.hpp"
